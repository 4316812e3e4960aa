"""A plugin for SGLang: it serves `Step3TextForCausalLM`, what MFA models are exported as.

SGLang (0.5.23) has Step-3's text model, but only as a part of the model with the vision tower. Installed in its
environment (`pip install --no-deps .` in a checkout), this is found through the entry point `sglang.srt.plugins`, and
`python -m sglang.launch_server --model-path exported` needs nothing else. `model` has the class; neither needs JAX.
"""

import logging
import os

PACKAGES = "SGLANG_EXTERNAL_MODEL_PACKAGE"


def register() -> None:
    """In each process of SGLang, before it reads a `config.json`: the class of our configs, and where our model is."""
    from sglang.srt.configs import Step3TextConfig
    from transformers import AutoConfig

    AutoConfig.register(Step3TextConfig.model_type, Step3TextConfig, exist_ok=True)
    if os.environ.setdefault(PACKAGES, __name__) != __name__:
        logging.getLogger(__name__).warning(
            "%s=%s: SGLang looks for models in one package; to serve Step3TextForCausalLM, import %s.model there",
            PACKAGES, os.environ[PACKAGES], __name__)
