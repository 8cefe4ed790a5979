"""What the commands share about the terminal they run in."""

from __future__ import annotations

import warnings

LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "huggingface_hub")


def quieten_libraries() -> None:
    """Keep other libraries' warnings and bars away from standard error."""
    import datasets
    import transformers
    from huggingface_hub.utils import logging as hub_logging

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
