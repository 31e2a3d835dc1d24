"""Third-party warnings that no user and nobody here can act on, switched off by their text.

Imported before Detectron2, which raises some of them while it is imported.
"""

import logging
import warnings

__all__ = ["THIRD_PARTY_WARNINGS"]

# What the pinned libraries say about one another.
THIRD_PARTY_WARNINGS = (
    "pkg_resources is deprecated as an API",
    "`torch.jit.script` is deprecated",
    "`torch.jit.script_method` is deprecated",
    "`torch.jit.load` is deprecated",
    "torch.meshgrid: in an upcoming release",
    "`torch.cuda.amp.",
)

# On a machine with CUDA's tools and no device. Whether there is one is told by the engine.
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in record.getMessage()
)
# Of how Detectron2 asks whether it is traced.
logging.getLogger("torch.fx._symbolic_trace").addFilter(
    lambda record: "is_fx_tracing will return true" not in record.getMessage()
)
for _text in THIRD_PARTY_WARNINGS:
    warnings.filterwarnings("ignore", message=_text)
