"""What the server that steps are forked from has done before: heavy imports, and building the job that `make demo` runs."""

import gc
from contextlib import suppress
from importlib import import_module

import dagster as dg
from sqlalchemy.orm import configure_mappers

from dagster_project.jobs import alignment

for module in ("pandas", "torch", "transformers", "peft", "trl", "datasets"):
    import_module(module)
for store in ("tracking", "model_registry"):
    import_module(f"mlflow.store.{store}.sqlalchemy_store")  # seconds, which MLflow puts off until it has a database
configure_mappers()  # of MLflow's tables
# What is put off until it is needed, which it is in nearly every step: of training, of drawing its curve, of Dagster's instance.
for module in (
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "trl.trainer.sft_trainer",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "dotenv",
    "upath.core",
):
    with suppress(ImportError):  # none is a promise of its library, and a step finds out by itself what it needs
        import_module(module)
with suppress(ImportError):  # a table that is made when a process loads its first model, not a documented function either
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
dg.reconstructable(alignment).get_definition()  # kept by Dagster

# A million objects that stay to the end: steps that collect garbage (all that load or train a model, several times) need not
# look through them, which takes half a second each time and copies the memory that they share with this server.
gc.collect()
gc.freeze()
