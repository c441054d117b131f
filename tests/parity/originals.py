"""The same networks in torch, and what is computed with them there."""

import re

import numpy as np
import safetensors.torch
import torch

try:
    import torchvision
except RuntimeError:
    # torchvision's compiled operators do not load beside every build of torch. The networks need none of them, so
    # declaring them is enough to import it.
    _LIBRARY = torch.library.Library("torchvision", "DEF")
    for _name in ("roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d"):
        _LIBRARY.define(f"{_name}(Tensor x) -> Tensor")
        _LIBRARY.define(f"_{_name}_backward(Tensor x) -> Tensor")
    _LIBRARY.define("nms(Tensor x) -> Tensor")
    _LIBRARY.define("qnms(Tensor x) -> Tensor")
    import torchvision

import timm
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from tests.parity import drawing
from tests.parity.cases import CASES, CLASSES, VOCABULARY

_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
# Blocks of EfficientNet-Lite0's stages; timm numbers them by stage, the port from first to last.
_DEPTHS = (1, 2, 2, 3, 3, 4, 1)


def _bert(**sizes):
    # Not "eager" attention, whose softmax is in float32 even where everything else is in float64.
    return BertForSequenceClassification._from_config(BertConfig(**sizes, **_NO_DROPOUT), attn_implementation="sdpa")


def _llama(**sizes):
    """With SmolLM2's widths. Norms and rotations are in float32 even where everything else is in float64."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        **sizes,
    )
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


NETWORKS = {
    "resnet50": lambda size: torchvision.models.resnet50(num_classes=CLASSES),
    "vgg11": lambda size: torchvision.models.vgg11(num_classes=CLASSES, dropout=0.0),
    "vgg11_bn": lambda size: torchvision.models.vgg11_bn(num_classes=CLASSES, dropout=0.0),
    "mobilenetv2": lambda size: torchvision.models.mobilenet_v2(num_classes=CLASSES, dropout=0.0),
    "deit_tiny": lambda size: timm.create_model("deit_tiny_patch16_224", img_size=size, num_classes=CLASSES),
    "deit_tiny_distilled": lambda size: timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=size, num_classes=CLASSES
    ),
    "bert_base": lambda size: _bert(),
    "minilm": lambda size: _bert(**_MINILM),
    "llama": lambda size: _llama(vocab_size=VOCABULARY, num_hidden_layers=3),
    # The original's momentum of 0.99 is 0.01 in torch; timm leaves it at torch's default.
    "efficientnet_lite0": lambda size: timm.create_model(
        "tf_efficientnet_lite0", num_classes=CLASSES, bn_momentum=0.01
    ),
}


def network(name, size=64):
    """The network as it is initialised, without dropout, for images of ``size`` x ``size``."""
    return NETWORKS[name](size)


def model(name, dtype):
    """The network with the weights drawn for it, on a tensor's name as ``models/`` has it."""
    drawn = network(name).to(dtype)
    state = {
        key: torch.from_numpy(drawing.tensor(_here(name, key), tuple(value.shape)))
        for key, value in drawn.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    drawn.load_state_dict(state)
    return drawn


def outputs(name, dtype=torch.float64):
    """What is compared; see :func:`tests.parity.cases.outputs`."""
    return outputs_of(name, model(name, dtype), CASES[name].inputs, CASES[name].labels)


def smollm2_outputs(tensors, inputs, labels, dtype=torch.float64):
    """What is compared of SmolLM2 with real weights, by Hugging Face's names."""
    network = _llama(vocab_size=49152, num_hidden_layers=30).to(dtype)
    network.load_state_dict(
        {key: torch.tensor(tensors[_here("llama", key)], dtype=dtype) for key in network.state_dict()}
    )
    return outputs_of("llama", network, inputs, labels)


def outputs_of(name, drawn, inputs, labels):
    """As :func:`outputs`, of a network with weights."""
    dtype = next(drawn.parameters()).dtype
    inputs = [torch.from_numpy(array) for array in inputs]
    inputs = [x.permute(0, 3, 1, 2).to(dtype) if x.is_floating_point() else x.long() for x in inputs]

    def logits():
        result = drawn(*inputs)
        return getattr(result, "logits", result)

    drawn.eval()
    with torch.no_grad():
        evaluated = logits()
    drawn.train()
    trained = logits()
    loss = torch.nn.functional.cross_entropy(trained.flatten(0, -2), torch.from_numpy(labels).long().flatten())
    loss.backward()
    statistics = {key: value for key, value in drawn.named_buffers() if "running" in key}
    return {
        "eval": {"logits": evaluated.numpy()},
        "train": {"logits": trained.detach().numpy(), "loss": loss.detach().numpy()},
        "statistics": {_here(name, key): value.numpy() for key, value in statistics.items()},
        "gradients": {_here(name, key): value.grad.numpy() for key, value in drawn.named_parameters()},
    }


def write_file(name, path):
    """Stores the network with the weights drawn for it as a safetensors file."""
    state = model(name, torch.float32).state_dict()
    safetensors.torch.save_file({_here(name, key): value.contiguous() for key, value in state.items()}, path)


def reads_file(name, path):
    """Whether the network takes all tensors of a safetensors file, and they are, bit by bit, those drawn for it."""
    tensors = safetensors.torch.load_file(path)
    taken = network(name)
    keys = [key for key in taken.state_dict() if not key.endswith("num_batches_tracked")]
    taken.load_state_dict({key: tensors[_here(name, key)] for key in keys})
    state = taken.state_dict()
    drawn = (drawing.tensor(_here(name, key), tuple(state[key].shape)) for key in keys)
    same = all(np.array_equal(state[key].numpy(), values) for key, values in zip(keys, drawn, strict=True))
    return same and len(tensors) == len({_here(name, key) for key in keys})


def _here(name, key):
    """Name in the files that are read here; that of a tied head is the embedding's."""
    if name == "llama" and key == "lm_head.weight":
        return "model.embed_tokens.weight"
    return _port_name(key) if name == "efficientnet_lite0" else key


def _port_name(key):
    """Name in the PyTorch port of a tensor of timm's EfficientNet-Lite0."""
    key = re.sub(r"^conv_stem", "_conv_stem", re.sub(r"^conv_head", "_conv_head", key))
    key = re.sub(r"^bn2", "_bn1", re.sub(r"^bn1", "_bn0", key))
    key = re.sub(r"^classifier", "_fc", key)
    block = re.match(r"blocks\.(\d+)\.(\d+)\.(\w+)\.(.*)", key)
    if not block:
        return key
    stage, position = int(block[1]), int(block[2])
    if stage == 0:  # no expansion in front
        modules = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
    else:
        modules = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1"}
        modules |= {"conv_pwl": "_project_conv", "bn3": "_bn2"}
    return f"_blocks.{sum(_DEPTHS[:stage]) + position}.{modules[block[3]]}.{block[4]}"
