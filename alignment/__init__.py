"""The alignment library: records, training, critique, evaluation. It knows nothing of Dagster, MLflow or DVC."""

import logging

# On a CPU it announces, once per process, an optional kernel that nothing here needs.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
