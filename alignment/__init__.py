"""The alignment library: records, training, critique, evaluation. It knows nothing of Dagster, MLflow or DVC."""
