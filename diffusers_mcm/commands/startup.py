"""A start that is quick, and quiet but for one line."""

import gc
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec, module_from_spec


@contextmanager
def quick_imports() -> Iterator[None]:
    """A tenth to a fifth less time for the libraries' imports.

    The garbage collector would go again and again through the objects that they make and keep. And where scipy is
    installed they import parts of it, for schedules of timesteps and object detection, that MCM has no use for.
    """
    _import_when_used("scipy", "stats")
    _import_when_used("scipy", "integrate")
    _import_when_used("scipy", "optimize", functions=("linear_sum_assignment",))
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _import_when_used(package: str, name: str, functions: tuple[str, ...] = ()) -> None:
    """Leave a module, if it is there, to be read when something is first looked up in it.

    `functions` may be looked up, by `from … import`, and make it be read when they are called.
    `importlib.util.LazyLoader` would read it as soon as it is imported a second time, for that looks up `__spec__`.
    """
    full_name = f"{package}.{name}"
    if full_name in sys.modules or find_spec(package) is None:
        return
    spec = find_spec(full_name)
    if spec is None or (loader := spec.loader) is None:
        return
    module = module_from_spec(spec)

    def read_and_get(attribute: str):
        if vars(module).pop("__getattr__", None) is not None:
            for function in functions:
                delattr(module, function)
            loader.exec_module(module)
        return getattr(module, attribute)

    vars(module)["__getattr__"] = read_and_get
    for function in functions:
        setattr(module, function, lambda *given, _name=function, **options: read_and_get(_name)(*given, **options))
    sys.modules[full_name] = module


@contextmanager
def quiet_libraries(verbose: bool = False) -> Iterator[None]:
    """diffusers and transformers without notices and bars of loading, unless `verbose`; bars of downloads stay.

    Errors and our own warnings are heard either way, the latter each once and in one line.
    """
    with ExitStack() as stack, warnings.catch_warnings():
        if not verbose:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module="diffusers_mcm")
            for restore in _silenced():
                stack.callback(restore)
        warnings.showwarning = _show_warning
        yield


def _silenced():
    """Silence both libraries' loggers and bars; what undoes each of it."""
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    bars_of_downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        level = logging.get_verbosity()
        yield lambda logging=logging, level=level: logging.set_verbosity(level)
        logging.set_verbosity_error()
        if logging.is_progress_bar_enabled():
            yield logging.enable_progress_bar
        logging.disable_progress_bar()
    if bars_of_downloads:  # which transformers has silenced with its own
        huggingface_hub.utils.enable_progress_bars()


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"diffusers-mcm: warning: {message}", file=file or sys.stderr)
