"""A causal language model with removed sublayers. Made by Billhook; copied into the checkpoints that need it.

Needs transformers and torch only. `per_layer_config` in config.json says which blocks lack their `attention` or
`mlp`; the `billhook` section names the modules that make up a part (`zero` returns zeros in the place of the part,
`drop` passes its input through: norms that served the part alone), `patches` what a repair put in the place of a part:
a constant, a factor, a matrix of low rank, and `resize_parts` the shapes of parts that have lost heads or neurons.
"""

import copy
import functools

import torch
from torch import nn
from transformers import conversion_mapping


class Zero(nn.Module):
    """Stands where a sublayer was and adds nothing to the residual stream: zeros of [batch, time, width]."""

    layer_idx = None

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs  # 1: a tensor; 2: a pair (tensor, None), as attention returns

    def forward(self, hidden_states=None, *args, **kwargs):
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.outputs == 2 else zeros


class PatchModule(nn.Module):
    """Stands where a sublayer was and adds bias + gain · x + up · down · x, [batch, time, width]."""

    layer_idx = None

    def __init__(self, outputs, width, bias=False, gain=False, rank=0):
        super().__init__()
        self.outputs = outputs
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.gain = nn.Parameter(torch.zeros(1)) if gain else None
        self.down = nn.Linear(width, rank, bias=False) if rank else None
        self.up = nn.Linear(rank, width, bias=False) if rank else None

    def forward(self, hidden_states=None, *args, **kwargs):
        added = torch.zeros_like(hidden_states) if self.up is None else self.up(self.down(hidden_states))
        added = added if self.gain is None else added + self.gain * hidden_states
        added = added if self.bias is None else added + self.bias
        added = added.to(hidden_states.dtype)  # while it is trained it may be more exact than the model
        return (added, None) if self.outputs == 2 else added


def remove_part(block, names, patch=None):
    """Take one part out of `block` in place; returns what stood there, {name: module}, for whoever wants it back.

    `patch`: what stands there now, instead of nothing.
    """
    stood = {name: getattr(block, name) for name in (*names["zero"], *names["drop"])}
    for name in names["drop"]:
        setattr(block, name, nn.Identity())
    for name in names["zero"]:
        setattr(block, name, patch or Zero(names["outputs"]))
    return stood


def set_parameter(block, name, tensor):
    """Give the parameter `name` of a block another tensor, of another shape too."""
    owner, _, key = name.rpartition(".")
    module = block.get_submodule(owner)
    setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    if key == "weight" and isinstance(module, nn.Linear):
        module.out_features, module.in_features = tensor.shape
    if key == "weight" and hasattr(module, "nf"):  # GPT-2's, whose weight is [inputs, outputs]
        module.nx, module.nf = tensor.shape


def set_attributes(block, attributes):
    """What modules of a narrower part must know: {module: {attribute: value}}; of `config` some fields."""
    for name, values in attributes.items():
        module = block.get_submodule(name)
        for key, value in values.items():
            if key == "config":
                own = copy.copy(module.config)
                for field, number in value.items():
                    setattr(own, field, number)
                value = own
            setattr(module, key, value)


def resize_parts(model):
    """Give the parts of a whole model that have lost heads or neurons their shapes, in place."""
    blocks = model.get_submodule(model.config.billhook["blocks_path"])
    for site, told in model.config.billhook.get("narrow", {}).items():
        block = blocks[int(site.partition(".")[2])]
        for name, shape in told["shapes"].items():
            owner, _, key = name.rpartition(".")
            old = getattr(block.get_submodule(owner), key)  # None of a bias that a repair has put in
            cut = torch.zeros(shape) if old is None else old.detach()[tuple(slice(n) for n in shape)].clone()
            set_parameter(block, name, cut)
        set_attributes(block, told["attributes"])


def skipped_parts(config):
    """{block index: parts that it lacks} from `per_layer_config` in whichever form this transformers keeps it."""
    raw = config.to_dict().get("per_layer_config") or {}
    return {int(index): tuple(entry.get("skip", ())) for index, entry in raw.items()}


def number_caches(blocks, missing):
    """Number the attentions that are left 0, 1, 2 …: each has one layer of the KV cache, and no other block has."""
    cached = 0
    for index, block in enumerate(blocks):
        for module in block.modules():
            if getattr(module, "layer_idx", None) is not None:
                module.layer_idx = cached
        cached += "attention" not in missing.get(index, ())


def remove_skipped(model):
    """Remove the skipped parts of a whole model in place."""
    blocks = model.get_submodule(model.config.billhook["blocks_path"])
    missing, told = skipped_parts(model.config), model.config.billhook
    for index, parts in missing.items():
        for part in parts:
            names, entry = told["parts"][part], told.get("patches", {}).get(f"{part}.{index}")
            patch = None if entry is None else PatchModule(names["outputs"], model.config.hidden_size, **entry)
            remove_part(blocks[index], names, patch)
    number_caches(blocks, missing)


@functools.cache
def pruned_classes(config_class, model_class):
    """Config and model of `billhook-<base type>`, subclasses of the stock ones."""

    def get_text_config(self, decoder=None, encoder=None):
        # Every cache is built from get_text_config(decoder=True): a stock config of the attentions that are left.
        if not decoder or "billhook" not in self.__dict__:
            return self
        missing = skipped_parts(self)
        keep = [i for i in range(self.num_hidden_layers) if "attention" not in missing.get(i, ())]
        fields = self.to_dict()
        for name in ("per_layer_config", "billhook", "auto_map", "model_type"):
            fields.pop(name, None)
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][i] for i in keep]
        fields[self.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
        return config_class.from_dict(fields)

    def build(self, config, *args, **kwargs):
        model_class.__init__(self, config, *args, **kwargs)
        resize_parts(self)
        remove_skipped(self)

    stem = "Billhook" + model_class.__name__
    new_config = type(
        "Billhook" + config_class.__name__,
        (config_class,),
        {
            "model_type": "billhook-" + config_class.model_type,
            "allow_global_per_layer_attribute_access": True,  # what a layer has of its own is in `resize_parts`
            "get_text_config": get_text_config,
            "__module__": __name__,
        },
    )
    new_model = type(stem, (model_class,), {"config_class": new_config, "__init__": build, "__module__": __name__})
    # The Hub's tensor names stay (mixtral, qwen3_moe, gpt_neox …): transformers keeps them by model type or by class.
    for ours, theirs in ((new_config.model_type, config_class.model_type), (stem, model_class.__name__)):
        renamings = conversion_mapping.get_checkpoint_conversion_mapping(theirs)
        if renamings is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(ours, renamings, overwrite=True)
    return new_config, new_model
