"""A language model as a policy: its decisions are the response tokens, its observation the text before them."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trimtab.core.batch import Batch
from trimtab.core.errors import nearest
from trimtab.core.stopwatch import timed
from trimtab.policies import packing
from trimtab.policies.decoders import ModuleDecoder
from trimtab.policies.lean import lean
from trimtab.policies.llama_decoder import LlamaDecoder
from trimtab.policies.readout import TOP, Readout, top
from trimtab.policies.recompute import can_recompute, recomputed
from trimtab.policies.sampler import LocalSampler
from trimtab.policies.view import PolicyError, Reading, View
from trimtab.policies.working import Working, stamp

# Logits of so many numbers at once (tokens x vocabulary): 128 MiB in float32.
LOGITS_AT_ONCE = 2**25
# Response tokens of a training pass, from which on its cost per token is flat on a CPU. Twice as many where all
# weights learn: every pass reads them all, and adds up as many gradients.
TOKENS_AT_ONCE = 2048
# Attention scores of one layer (rows x heads x places x places) that are kept for the backward: 16 MiB in float32.
SCORES_AT_ONCE = 2**22
# Beside a saved model: what its files do not say about how it was used.
NOTES = "trimtab.json"


class LanguagePolicy(nn.Module):
    """A causal language model of transformers (or peft around one), its tokenizer, and a sampler of its own.

    model: parameters in float32 (float64 for exact tests). compute: bfloat16 runs the forward under autocast, else
    the parameters' dtype. chat: whether `encode` puts a plain string into the tokenizer's chat template. checkpointing:
    layers are computed again in the backward. `reading` counts what the layers have read, and the padding in it.

    `state_dict` holds what can learn: every parameter (tied ones once), or the adapter alone where there is one.
    Dropout stays off in `train()` too: a log-probability that changes between two readings breaks every ratio.
    """

    provides: frozenset[str] = frozenset({"logp", "entropy", "hidden", "topk", "topk_ids"})

    def __init__(
        self, model: nn.Module, tokenizer: Any, *, name: str, source: str, compute: torch.dtype, chat: bool = False,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if chat and not getattr(tokenizer, "chat_template", None):
            raise PolicyError(f"chat=True, but the tokenizer of {name!r} has no chat template; give chat=False")
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.chat = chat
        self.checkpointing = checkpointing
        if checkpointing and not can_recompute(self.causal):
            raise PolicyError(
                f"checkpointing=True, but {name!r} has no layers that can be computed again; leave it out"
            )
        self.autocast = compute == torch.bfloat16
        self.wide = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
        self.ends = _ends(self.causal, tokenizer)
        self.fill: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.ends[0]
        self.sampler = LocalSampler(self._decoder, self.ends, self.fill, self.wide, self.context)
        self._working = Working()
        self._plain_head: bool | None = None
        self._packs = packing.fits(self.causal, self.fill)
        self.reading = Reading()
        self._left_out = _left_out(self)
        self.register_state_dict_post_hook(_drop_left_out)
        self.register_load_state_dict_post_hook(_forgive_left_out)

    @property
    def causal(self) -> Any:
        """The transformers model itself, inside the adapter's wrapper if there is one."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def lora(self) -> int:
        """Rank of the adapter, 0 without one."""
        configs = getattr(self.model, "peft_config", None)
        return next(iter(configs.values())).r if configs else 0

    @property
    def context(self) -> int | None:
        """The most tokens, prompt and answer together, that the model reads; None where its config names no limit."""
        return getattr(self.causal.config.get_text_config(), "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def train(self, mode: bool = True) -> LanguagePolicy:
        super().train(mode)
        self.model.eval()
        return self

    # -- text ---------------------------------------------------------------------------------------------------
    def encode(self, prompt: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a prompt. A string is one user message when `chat`, else plain text; a list is a chat.

        Raises `PolicyError` for a list of messages when the tokenizer has no chat template.
        """
        if isinstance(prompt, str) and not self.chat:
            return list(self.tokenizer(prompt)["input_ids"])
        if not getattr(self.tokenizer, "chat_template", None):
            raise PolicyError(f"{self.name!r} has no chat template, so a prompt is plain text, not a list of messages")
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(self, text: str) -> list[int]:
        """Token ids of a reference answer with its end token; after a plain prompt a space comes first."""
        joined = text if self.chat else " " + text.lstrip()
        end = self.tokenizer.eos_token_id
        ids = self.tokenizer(joined, add_special_tokens=False)["input_ids"]
        return [*ids, end if end is not None else self.ends[0]]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of these ids, without special tokens."""
        return self.tokenizer.decode([int(t) for t in tokens], skip_special_tokens=True)

    # -- evaluation ---------------------------------------------------------------------------------------------
    def evaluate(self, batch: Batch, want: set[str]) -> dict[str, Tensor]:
        """What the policy thinks now of the decisions in `batch`, with gradient.

        Reads prompt long `[N, P]` (left padded), prompt_mask bool `[N, P]`, action long `[N, T]` (right padded), mask
        `[N, T]`, and, if there, temperature `[N]` > 0. A decision with mask 0 before the last one with mask 1 is
        context (a tool's words). Returns, 0 where mask is 0: logp `[N, T]` = log softmax(logits / temperature)[action],
        entropy `[N, T]` of that whole distribution in nats, hidden `[N, T, H]` the state each decision is read from,
        topk `[N, T, K]` the K <= 50 largest log-probabilities of that distribution, descending, and topk_ids long
        `[N, T, K]` their tokens; these two have no gradient.
        float32, or float64 for a float64 policy; independent of padding and of which rows are together, to rounding.

        Raises `PolicyError` for an unknown want, an empty prompt, or a temperature that is not positive.
        """
        unknown = set(want) - self.provides
        if unknown:
            raise PolicyError(f"a language policy cannot give {sorted(unknown)[0]!r}. " + nearest("", self.provides))
        if torch.is_grad_enabled():
            self._working.learning()
        view = View.of(batch, batch["mask"].to(self.device).bool(), self.wide)
        if view is None:
            config, (n, t) = self.causal.config.get_text_config(), batch["mask"].shape
            k = (min(TOP, config.vocab_size),)
            tail = {"hidden": (config.hidden_size,), "topk": k, "topk_ids": k}
            kind = {name: torch.long if name == "topk_ids" else self.wide for name in want}
            return {name: torch.zeros(n, t, *tail.get(name, ()), dtype=kind[name], device=self.device) for name in want}
        again = recomputed(self.causal) if self.checkpointing else contextlib.nullcontext()
        with self._narrow(), lean(self.causal), again:
            values = self._values(view, set(want))
        return {name: view.spread(values[name]) for name in want}

    def rows_at_once(self, batch: Batch) -> int | None:
        """How many rows a training pass reads together when nobody says: more only take memory. None is all of them.

        Enough rows for TOKENS_AT_ONCE response tokens, and for eight times their prompts, which every pass reads again.
        """
        if self.device.type != "cpu":
            return None
        tokens = TOKENS_AT_ONCE if self.lora else 2 * TOKENS_AT_ONCE
        said, before = (batch[name].sum(1).double().mean().item() for name in ("mask", "prompt_mask"))
        return math.ceil(max(tokens, 8 * before) / max(said, 1))

    def _values(self, view: View, want: set[str]) -> dict[str, Tensor]:
        """What is wanted of the view's `M` decisions."""
        head, out = self._head(view.prompt), {}
        if head is not None or want == {"hidden"}:
            states = self._states(view)
        else:
            inputs, last = self._inputs(view.ids, view.attend_all), view.picked.shape[1]
            inputs |= {**_last_logits(self.causal, last), "output_hidden_states": "hidden" in want}
            with self._attention(view):
                got = self.causal(**inputs)
            states, head = got.logits[:, -last:][view.picked], _same
            if "hidden" in want:
                out["hidden"] = got.hidden_states[-1][:, -last:][view.picked].to(self.wide)
        if "hidden" in want and "hidden" not in out:
            out["hidden"] = states.to(self.wide)
        if want & {"logp", "entropy"}:
            assert head is not None
            out |= self._read(head, states, view.tokens, view.scale, "entropy" in want)
        if want & {"topk", "topk_ids"}:
            assert head is not None
            out["topk"], out["topk_ids"] = top(head, states, view.scale, self.wide)
        return out

    def _states(self, view: View) -> Tensor:
        """The last hidden state before each decision, `[M, H]`. A prompt that rows share is read once."""
        if self._packs and self.device.type == "cpu":
            packed = packing.pack(view, getattr(self.causal.config, "num_attention_heads", 1))
            self.reading.count(len(packed.ids), len(packed.ids))
            return packing.states(self.causal, packed)[packed.state[view.picked]]
        with self._attention(view):
            return self._padded_states(view)

    def _padded_states(self, view: View) -> Tensor:
        """The same of a model that cannot read rows as one."""
        trunk, last = self.causal.base_model, view.picked.shape[1]
        prompts, owner = view.prompt.masked_fill(~view.attend, -1).unique(dim=0, return_inverse=True)
        cache = DynamicCache(config=self.causal.config)
        whole = len(prompts) == len(owner) or self.checkpointing  # a cache cannot be filled twice
        if whole or any(type(layer) is not DynamicLayer for layer in cache.layers):
            self.reading.count(int(view.lengths.sum() + view.attend.sum()), view.ids.numel())
            return trunk(**self._inputs(view.ids, view.attend_all)).last_hidden_state[:, -last:][view.picked]
        attend, ids = prompts >= 0, prompts.clamp_min(0)
        self.reading.count(int(view.lengths.sum() + attend.sum()), view.action.numel() + ids.numel())
        read = trunk(**self._inputs(ids, attend, cache)).last_hidden_state[:, -1:][owner]
        if last > 1:
            cache.batch_select_indices(owner)
            rest = trunk(**self._inputs(view.action, view.attend_all, cache)).last_hidden_state
            read = torch.cat([read, rest], 1)
        return read[view.picked]

    def _inputs(self, ids: Tensor, attend: Tensor, cache: DynamicCache | None = None) -> dict[str, Any]:
        """Arguments of a forward over `ids`, the last places of `attend`."""
        inputs: dict[str, Any] = {"input_ids": ids, "use_cache": cache is not None}
        if cache is not None:
            inputs["past_key_values"] = cache
        if not attend.all():
            # Without a mask attention takes its faster causal path.
            inputs["attention_mask"] = attend.long()
        if packing.has_places(self.causal):
            inputs["position_ids"] = (attend.long().cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return inputs

    def _read(
        self, head: Callable[[Tensor], Tensor], states: Tensor, tokens: Tensor, inverse: Tensor | None, entropy: bool
    ) -> dict[str, Tensor]:
        """Log-probability (and entropy) of `M` decisions from the states before them, some tokens at a time."""
        if type(head) is nn.Linear:
            narrow = torch.bfloat16 if self.autocast else self.wide
            weight = self._working.head(head.weight, narrow)
            logp, h = Readout.apply(states, weight, head.bias, tokens, inverse, narrow, entropy)
            return {"logp": logp, "entropy": h} if entropy else {"logp": logp}

        def part(x: Tensor, token: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
            logits = head(x).to(self.wide)
            if scale is not None:
                logits = logits * scale[:, None]
            every = logits.log_softmax(-1)  # six times as fast as logsumexp on a CPU
            logp = every.gather(1, token[:, None]).squeeze(1)
            return logp, -(every.exp() * every).sum(-1) if entropy else None

        vocabulary = self.causal.config.get_text_config().vocab_size
        step = max(1, LOGITS_AT_ONCE // vocabulary)
        parts = []
        for i in range(0, len(tokens), step):
            some = (states[i : i + step], tokens[i : i + step], None if inverse is None else inverse[i : i + step])
            # More than one part: keep none of their logits for the backward, compute them again there.
            again = len(tokens) > step and torch.is_grad_enabled()
            parts.append(checkpoint(part, *some, use_reentrant=False) if again else part(*some))
        out = {"logp": torch.cat([logp for logp, _ in parts])}
        if entropy:
            out["entropy"] = torch.cat([h for _, h in parts if h is not None])
        return out

    @torch.no_grad()
    def _head(self, ids: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The output layer, if logits are that layer of the last state and no more (no cap, no scale); else None."""
        head = self.causal.get_output_embeddings()
        if self._plain_head is None:
            # Asked of the model itself, once: no list of architectures can be complete.
            probe = ids[:1, -4:]
            state = self.causal.base_model(input_ids=probe, use_cache=False).last_hidden_state
            logits = self.causal(input_ids=probe, use_cache=False).logits
            self._plain_head = head is not None and torch.equal(head(state), logits)
        return head if self._plain_head else None

    def _narrow(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self.autocast else contextlib.nullcontext()

    def _attention(self, view: View) -> contextlib.AbstractContextManager[None]:
        """On a CPU, short rows that need a gradient are read with plain products.

        The fused kernel's bfloat16 backward takes seven times as long at 20 tokens; it pays when the scores grow big.
        """
        config = self.causal.config
        scores = view.ids.numel() * view.ids.shape[1] * getattr(config, "num_attention_heads", 1)
        small = torch.is_grad_enabled() and scores <= SCORES_AT_ONCE
        # Not in float64: the plain softmax of transformers is float32 whatever the model is.
        plain = config._attn_implementation == "sdpa" and self.device.type == "cpu" and self.wide == torch.float32
        return packing.attending(self.causal, "eager" if small and plain else config._attn_implementation)

    # -- sampling -----------------------------------------------------------------------------------------------
    def stamp(self) -> tuple[Any, ...]:
        """Equal as long as no parameter changed."""
        return stamp(self.model.parameters())

    def touch(self) -> None:
        """Say that parameters changed in a way torch cannot see (through `.data` or numpy)."""
        self._working.touch()

    @timed("weights")
    def _decoder(self) -> ModuleDecoder | LlamaDecoder:
        return self._working.decoder(self.model, self.causal, self.autocast, self.name)

    # -- files --------------------------------------------------------------------------------------------------
    def save(self, folder: Path | str) -> None:
        """Write an ordinary folder: `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load it.

        With an adapter the folder holds the adapter alone and names its base; a base without files goes into `base/`.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.lora and not self.source:
            base = folder / "base"
            plain: Any = self._plain_copy()
            plain.save_pretrained(base)
            self.tokenizer.save_pretrained(base)
            for config in self.model.peft_config.values():
                config.base_model_name_or_path = str(base.resolve())
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (folder / NOTES).write_text(json.dumps({"chat": self.chat}) + "\n")

    def _plain_copy(self) -> nn.Module:
        """The base model without the adapter."""
        state = {
            name.replace(".base_layer", ""): value
            for name, value in self.causal.state_dict().items()
            if ".lora_" not in name
        }
        plain = type(self.causal)(self.causal.config).to(self.wide)
        plain.load_state_dict(state)
        return plain

    def describe(self) -> dict[str, Any]:
        """What a run writes down: name, source, parameters, trainable, dtype, compute, decoder, lora, chat."""
        parameters = list(self.model.parameters())
        return {
            "name": self.name,
            "source": self.source.replace(str(Path.home()), "~", 1),
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "dtype": str(self.wide).removeprefix("torch."),
            "compute": "bfloat16" if self.autocast else str(self.wide).removeprefix("torch."),
            "decoder": "fused" if LlamaDecoder.fits(self.causal) else "transformers",
            "lora": self.lora,
            "chat": self.chat,
        }


def _same(x: Tensor) -> Tensor:
    return x


def _last_logits(model: Any, last: int) -> dict[str, int]:
    return {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _ends(model: Any, tokenizer: Any) -> list[int]:
    """Ids that finish a response: those of the generation config and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    ids.discard(None)
    if not ids:
        raise PolicyError("neither the model nor its tokenizer names an end token; set tokenizer.eos_token first")
    return sorted(ids)


def _left_out(policy: LanguagePolicy) -> frozenset[str]:
    """Names that `state_dict` leaves out: frozen ones beside an adapter, and second names of a tied parameter."""
    seen: set[int] = set()
    out = set()
    for name, p in policy.named_parameters(remove_duplicate=False):
        if id(p) in seen or (policy.lora and not p.requires_grad):
            out.add(name)
        seen.add(id(p))
    return frozenset(out)


def _drop_left_out(policy: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in policy._left_out:
        state.pop(prefix + name, None)


def _forgive_left_out(policy: Any, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if not any(k.endswith(n) for n in policy._left_out)]
