"""How steps run: a process per step, so that memory is freed and a killed step is caught and retried.

Forked from a server that has the heavy imports done and the job built (`preload`), a step starts in well under a second.
"""

import os

import dagster as dg

executor = dg.multiprocess_executor.configured(
    {
        # The `gpu` pool already keeps training steps one by one; two lets data steps overlap with them.
        "max_concurrent": int(os.environ.get("ALIGNMENT_MAX_CONCURRENT", "2")),
        "start_method": {"forkserver": {"preload_modules": ["dagster_project.preload"]}},
    }
)
