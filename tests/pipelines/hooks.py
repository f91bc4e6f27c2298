"""What accelerate's hooks see of a pipeline's components."""

from accelerate.hooks import ModelHook, add_hook_to_module


def record_calls(pipe, *components) -> list[str]:
    """A list to which the name of each of these components is added whenever it is called."""
    order = []

    class Recorder(ModelHook):
        def __init__(self, name):
            self.name = name

        def pre_forward(self, module, *args, **kwargs):
            order.append(self.name)
            return args, kwargs

    for name in components:
        add_hook_to_module(getattr(pipe, name), Recorder(name))
    return order
