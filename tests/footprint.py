"""What a model looks like from outside, to see that nothing is left on it."""


def footprint(model):
    """Everything a compression could leave behind; transformers' own lazily installed hooks are set aside."""
    own = {"_output_capturing_hooks_installed", "_previous_max_cache_length", "_cache"}
    marks = []
    for name, module in model.named_modules():
        hooks = [len(module._forward_pre_hooks), len(module._forward_hooks), len(module._backward_hooks)]
        attributes = sorted(set(vars(module)) - own)
        marks.append((name, hooks, attributes, id(vars(module).get("config"))))
    return marks, list(model.state_dict())
