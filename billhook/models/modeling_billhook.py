"""A causal language model with removed sublayers. Made by Billhook; copied into the checkpoints that need it.

Needs transformers and torch only. `per_layer_config` in config.json says which blocks lack their `attention` or
`mlp`; the `billhook` section names the modules that make up a part (`zero` returns zeros in the place of the part,
`drop` passes its input through: norms that served the part alone), `patches` what a repair put in the place of a part:
a constant, a factor, a matrix of low rank, `narrow` the shapes of parts that have lost heads or neurons, `factors`
the ranks of linear maps that are two smaller ones, and `shortcuts` that a matrix stands in the shortcut around each
part.

`BillhookLlamaConfig`, `BillhookLlamaForCausalLM` and the like are names of this module for every stock class that
transformers has: they are made when they are asked for.
"""

import functools
import sys

import torch
import transformers
from torch import nn
from transformers import conversion_mapping
from transformers.models.auto import tokenization_auto

AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
PREFIX = "Billhook"  # of the names of classes


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


class Factors(nn.Module):
    """A linear map as two smaller ones, up · down · x + bias: [..., inputs] -> [..., outputs]."""

    def __init__(self, inputs, outputs, rank, bias):
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x):
        return self.up(self.down(x))


class LayerConfig:
    """The config of a model as a narrower module reads it: the model's own, but for a few numbers."""

    def __init__(self, shared, own):
        self.__dict__.update(shared=shared, own=own)

    def __getattr__(self, name):
        if name in ("shared", "own") or name.startswith("__"):  # asked before they are there, by copy and pickle
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name, value):
        setattr(self.shared, name, value)


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
    learns = getattr(module, key) is None or getattr(module, key).requires_grad
    setattr(module, key, nn.Parameter(tensor, requires_grad=learns))
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
                value = LayerConfig(getattr(module.config, "shared", module.config), dict(value))
            setattr(module, key, value)


def blocks_of(model):
    """The blocks of a model, with a head or without one."""
    base = getattr(model, model.base_model_prefix, model)
    return base.get_submodule(model.config.billhook["blocks_path"].removeprefix(f"{model.base_model_prefix}."))


def resize_parts(model):
    """Give the parts of a whole model that have lost heads or neurons their shapes, in place."""
    blocks = blocks_of(model)
    for site, told in model.config.billhook.get("narrow", {}).items():
        block = blocks[int(site.partition(".")[2])]
        for name, shape in told["shapes"].items():
            owner, _, key = name.rpartition(".")
            old = getattr(block.get_submodule(owner), key)  # None of a bias that a repair has put in
            cut = torch.zeros(shape) if old is None else old.detach()[tuple(slice(n) for n in shape)].clone()
            set_parameter(block, name, cut)
        set_attributes(block, told["attributes"])


def factor_linear(block, name, rank):
    """Put two linear maps of a rank, without values, in the place of the one of a block that is called `name`."""
    owner, _, key = name.rpartition(".")
    old = block.get_submodule(name)
    sizes = (old.nx, old.nf) if hasattr(old, "nf") else (old.in_features, old.out_features)  # GPT-2's has others
    new = Factors(*sizes, rank, getattr(old, "bias", None) is not None)
    setattr(block.get_submodule(owner), key, new)
    return new


def factor_linears(model):
    """Factor the linear maps of a whole model that its config names, in place."""
    blocks = blocks_of(model)
    for site, ranks in model.config.billhook.get("factors", {}).items():
        for name, rank in ranks.items():
            factor_linear(blocks[int(site.partition(".")[2])], name, rank)


@functools.cache
def shortcut_class(block_class, parts):
    """A class of blocks whose residual stream has another basis after each part: S · x + part(norm(x)).

    `parts`: the names of norm and part in the block, attention first.
    """

    def forward(self, hidden_states, **kwargs):
        for number, (norm, part) in enumerate(parts):
            added = getattr(self, part)(getattr(self, norm)(hidden_states), **({} if number else kwargs))
            added = added[0] if isinstance(added, tuple) else added
            hidden_states = self.shortcuts[number](hidden_states) + added
        return hidden_states

    # Under the same name, by which devices are told which modules not to divide.
    return type(block_class.__name__, (block_class,), {"forward": forward, "__module__": __name__})


def add_shortcuts(model):
    """Put matrices, without values, into the shortcuts of a model whose config says that it has them, in place."""
    told = model.config.billhook
    if not told.get("shortcuts"):
        return
    width = model.config.hidden_size
    parts = tuple((told["parts"][part]["drop"][0], told["parts"][part]["zero"][0]) for part in ("attention", "mlp"))
    for block in blocks_of(model):
        block.shortcuts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in parts)
        block.__class__ = shortcut_class(type(block), parts)


def stock_fields(fields):
    """Those fields of a config of ours, given as a dict, that a stock config of the type takes.

    The stock config of Llama refuses a residual stream that is no multiple of its heads, as with shortcuts it may be:
    it is told heads times head_dim then, which a KV cache and checks of a config do not read.
    """
    own = ("per_layer_config", "billhook", "auto_map", "model_type")
    found = {name: value for name, value in fields.items() if name not in own}
    told = fields.get("billhook")
    if isinstance(told, dict) and told.get("shortcuts"):
        heads = found["num_attention_heads"]
        found["hidden_size"] = heads * (found.get("head_dim") or found["hidden_size"] // heads)
    return found


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
    blocks = blocks_of(model)
    missing, told = skipped_parts(model.config), model.config.billhook
    for index, parts in missing.items():
        for part in parts:
            names, entry = told["parts"][part], told.get("patches", {}).get(f"{part}.{index}")
            patch = None if entry is None else PatchModule(names["outputs"], model.config.hidden_size, **entry)
            remove_part(blocks[index], names, patch)
    number_caches(blocks, missing)


def tell_peft(base, model_type):
    """Give peft, where it is imported, the modules that its adapters take by default: those of the stock type."""
    for name, targets in vars(sys.modules.get("peft.utils.constants", object)).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and base in targets:
            targets.setdefault(model_type, targets[base])


def tell_tokenizers(config_class, base_class):
    """Have AutoTokenizer choose for a type what it chooses for the stock type: it goes by the name of the type."""
    names, base = tokenization_auto.TOKENIZER_MAPPING_NAMES, base_class.model_type
    if base in names:
        names.setdefault(config_class.model_type, names[base])
    if base in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)
    tokenizer = tokenization_auto.TOKENIZER_MAPPING.get(base_class, None)
    if tokenizer is not None:
        transformers.AutoTokenizer.register(config_class, tokenizer, exist_ok=True)


def pruned_config(config_class):
    """The config of `billhook-<base type>`, a subclass of the stock one."""

    def get_text_config(self, decoder=None, encoder=None):
        # Every cache is built from get_text_config(decoder=True): a stock config of the attentions that are left.
        if not decoder or "billhook" not in self.__dict__:
            return self
        missing = skipped_parts(self)
        keep = [i for i in range(self.num_hidden_layers) if "attention" not in missing.get(i, ())]
        fields = stock_fields(self.to_dict())
        if fields.get("layer_types"):
            fields["layer_types"] = [fields["layer_types"][i] for i in keep]
        fields[self.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(keep)
        return config_class.from_dict(fields)

    def validate(self):
        # When it is saved. With shortcuts a residual stream need not be a multiple of the heads: see `stock_fields`.
        if "billhook" in self.__dict__ and self.billhook.get("shortcuts"):
            config_class(**stock_fields(self.to_dict())).validate()
        else:
            config_class.validate(self)

    def to_dict(self):
        tell_peft(config_class.model_type, self.model_type)  # which asks for this before it looks a type up
        classes = pruned_classes(config_class)
        told = {auto: f"{__name__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in classes.items()}
        return {**config_class.to_dict(self), "auto_map": told}

    return type(
        PREFIX + config_class.__name__,
        (config_class,),
        {
            "model_type": "billhook-" + config_class.model_type,
            "allow_global_per_layer_attribute_access": True,  # what a layer has of its own is in `resize_parts`
            "get_text_config": get_text_config,
            "validate": validate,
            "to_dict": to_dict,
            "_auto_class": "AutoConfig",  # so that this file travels with what is saved
            "__module__": __name__,
        },
    )


def pruned_model(model_class, config_class):
    """A model of `billhook-<base type>`, a subclass of a stock one: with a head, or without."""

    def build(self, config, *args, **kwargs):
        model_class.__init__(self, config, *args, **kwargs)
        base = getattr(self, self.base_model_prefix, self)
        if base is self or type(base).__module__ != __name__:  # else it has cut itself
            resize_parts(self)
            factor_linears(self)
            add_shortcuts(self)
            remove_skipped(self)

    return type(
        PREFIX + model_class.__name__,
        (model_class,),
        {"config_class": config_class, "__init__": build, "__module__": __name__},
    )


@functools.cache
def pruned_classes(config_class):
    """{name of an auto class: its class of `billhook-<base type>`}, of the stock type with this config."""
    made = {"AutoConfig": pruned_config(config_class)}
    names = {made["AutoConfig"].model_type: config_class.model_type}
    for auto in AUTO_MODELS:
        stock = getattr(transformers, auto)._model_mapping.get(config_class, None)
        if stock is not None:
            made[auto] = pruned_model(stock, made["AutoConfig"])
            names[made[auto].__name__] = stock.__name__
            getattr(transformers, auto).register(made["AutoConfig"], made[auto], exist_ok=True)
    # The Hub's tensor names stay (mixtral, qwen3_moe, gpt_neox …): transformers keeps them by model type or by class.
    for ours, theirs in names.items():
        renamings = conversion_mapping.get_checkpoint_conversion_mapping(theirs)
        if renamings is not None:
            conversion_mapping.register_checkpoint_conversion_mapping(ours, renamings, overwrite=True)
    tell_tokenizers(made["AutoConfig"], config_class)
    globals().update({kind.__name__: kind for kind in made.values()})
    return made


def __getattr__(name):
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    config_class = getattr(stock, "config_class", None) or stock
    if isinstance(config_class, type) and issubclass(config_class, transformers.PreTrainedConfig):
        pruned_classes(config_class)
    if name not in globals():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals()[name]
