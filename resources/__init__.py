"""The only code that touches the outside: artifact store, MLflow, DVC, model sources, handles on disk."""
