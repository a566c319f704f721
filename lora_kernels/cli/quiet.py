"""Keeps libraries quiet: their progress bars and advice would break up the one bar and the report."""

import logging
import warnings


def quieten_libraries() -> None:
    """transformers, PEFT, the Hub's client and bitsandbytes say nothing but errors from here on."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
