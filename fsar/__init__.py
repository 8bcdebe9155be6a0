"""Few-shot action recognition from video.

The names in `__all__` are the public interface: they keep their meaning from one minor version to the next.
Everything below `fsar.<wing>` is internal until version 1.0 and may move.
A name is imported when it is first used, so that `import fsar` is fast and does not load torch.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "FewShotRecognizer", "load_pretrained",                    # recognise your own videos
    "create_model", "FewShotModel", "METHODS", "Backbone",     # build a model, or your own method
    "Config", "prepare", "motions",                            # what to run, and on which data
    "run", "train", "evaluate", "compare", "study", "sweep",   # from one training to many
    "FsarError",                                               # every error that you can mend
]

if TYPE_CHECKING:
    from .backbones.base import Backbone as Backbone
    from .core.basics import FsarError as FsarError
    from .core.config import Config as Config
    from .data import motions as motions
    from .data.datasets import prepare_data as prepare
    from .engine.training import train as train
    from .experiments.comparison import compare_methods as compare
    from .experiments.runs import evaluate_checkpoint as evaluate
    from .experiments.runs import run as run
    from .experiments.studies import study as study
    from .experiments.sweeps import run_sweep as sweep
    from .model.base import METHODS as METHODS
    from .model.base import FewShotModel as FewShotModel
    from .model.registry import create_model as create_model
    from .predict.hub import load_pretrained as load_pretrained
    from .predict.recognizer import FewShotRecognizer as FewShotRecognizer

_HOMES = {  # public name → module:name; the same as above, for use at run time
    "Backbone": "fsar.backbones.base:Backbone",
    "Config": "fsar.core.config:Config",
    "FewShotModel": "fsar.model.base:FewShotModel",
    "FewShotRecognizer": "fsar.predict.recognizer:FewShotRecognizer",
    "FsarError": "fsar.core.basics:FsarError",
    "METHODS": "fsar.model.base:METHODS",
    "compare": "fsar.experiments.comparison:compare_methods",
    "create_model": "fsar.model.registry:create_model",
    "evaluate": "fsar.experiments.runs:evaluate_checkpoint",
    "load_pretrained": "fsar.predict.hub:load_pretrained",
    "motions": "fsar.data:motions",
    "prepare": "fsar.data.datasets:prepare_data",
    "run": "fsar.experiments.runs:run",
    "study": "fsar.experiments.studies:study",
    "sweep": "fsar.experiments.sweeps:run_sweep",
    "train": "fsar.engine.training:train",
}


def __getattr__(name: str) -> Any:
    "Import a public name when it is first asked for."
    if name not in _HOMES: raise AttributeError(f"module 'fsar' has no attribute {name!r}; its public names are {', '.join(__all__)}")
    module, _, attribute = _HOMES[name].partition(":")
    if module == "fsar.data": return import_module(f"{module}.{attribute}")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
