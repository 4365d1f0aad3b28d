"""mate in Hugging Face transformers.

- :func:`patch` puts mate's kernels into a loaded model that has KDA layers of its own
  (``kimi_linear``); :func:`unpatch` takes them out again. Parameters, checkpoints and PEFT are
  untouched.
- :class:`MateLlamaConfig`, :class:`MateLlamaModel` and :class:`MateLlamaForCausalLM`: Llama with
  KDA in place of some or all attention layers. Importing this package registers them with
  ``AutoConfig``, ``AutoModel`` and ``AutoModelForCausalLM``.

Needs transformers 5: ``pip install '.[hf]'`` in mate's source folder.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "mate.hf needs transformers: pip install '.[hf]' in mate's source folder"
    ) from error

from mate.hf.llama import MateLlamaConfig, MateLlamaForCausalLM, MateLlamaModel
from mate.hf.patching import patch, unpatch

__all__ = ["MateLlamaConfig", "MateLlamaForCausalLM", "MateLlamaModel", "patch", "unpatch"]
