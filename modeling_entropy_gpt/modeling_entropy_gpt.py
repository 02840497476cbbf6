# SPDX-License-Identifier: Apache-2.0
"""PyTorch EntropyGPT: GPT-2 whose non-linearities can be removed, with entropy-guided attention (arXiv 2501.03489)."""

from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.processing_utils import Unpack
from transformers.pytorch_utils import Conv1D
from transformers.utils import TransformersKwargs, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

# Every file of the model, also those that others import: transformers 5.5 copies no more than these to its cache.
from .attention_blocks import plans  # noqa: F401
from .attention_functions import whole_attention  # noqa: F401
from .attention_masks import prepare_mask
from .attention_weights import weigh  # noqa: F401
from .blocks import EntropyGPTAttention, EntropyGPTBlock, serves_every_function
from .blockwise_attention import blockwise_attention  # noqa: F401
from .configuration_entropy_gpt import EntropyGPTConfig
from .entropy_attention import entropy_attention  # noqa: F401
from .entropy_regularization import count_visible_keys, number_sequences
from .forward_keywords import CACHE, check_keywords, is_paged, slice_logits_to_keep, takes_cache
from .heads import EntropyGPTHead, smoothed_cross_entropy
from .layers import EntropyGPTLayer, EntropyGPTNormalizedConv1D, build_norm
from .model_outputs import (
    EntropyGPTCausalLMOutput,
    EntropyGPTModelOutput,
    EntropyGPTQuestionAnsweringOutput,
    EntropyGPTSequenceClassifierOutput,
    EntropyGPTTokenClassifierOutput,
)
from .notation import format_notation  # noqa: F401
from .releases import TESTED  # noqa: F401


if TYPE_CHECKING:  # where it is needed, blockwise_attention.py imports it
    from .triton_attention import run_forward  # noqa: F401


logger = logging.get_logger(__name__)

# Attention implementations in whose place another attention function may stand, and all of flash attention.
OWN_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


class EntropyGPTPreTrainedModel(PreTrainedModel):
    config: EntropyGPTConfig
    config_class = EntropyGPTConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EntropyGPTBlock"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": OutputRecorder(EntropyGPTBlock, index=0),
        "attentions": OutputRecorder(EntropyGPTAttention, index=1),
    }
    # Constants that old GPT-2 files carry.
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias$", r"attn\.masked_bias$"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Conv1D | EntropyGPTNormalizedConv1D):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range * module.initializer_scale)
            init.zeros_(module.bias)
        if isinstance(module, EntropyGPTLayer):
            module.initialize()

    def __init__(self, config: EntropyGPTConfig, *inputs, **kwargs):
        config.validate()  # fields may have been set since it was made
        super().__init__(config, *inputs, **kwargs)

    def __init_subclass__(cls, **kwargs):
        """Keeps name and module of the model in a class that torch derives (FSDP): its code is saved by these."""
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("torch."):
            model_class = next(base for base in cls.__mro__ if not base.__module__.startswith("torch."))
            cls.__module__, cls.__name__ = model_class.__module__, model_class.__name__

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        """As every model's. FSDP hands over tied weights as if they were two."""
        if state_dict is not None and self.config.tie_word_embeddings:
            state_dict = {name: t for name, t in state_dict.items() if name not in self.all_tied_weights_keys}
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    @property
    def penalizes_entropy(self) -> bool:
        """Whether the loss contains the entropy penalty: in training, where the config says so."""
        return self.training and self.config.entropy_regularization

    @property
    def penalizes_rows(self) -> bool:
        """Whether the loss contains a penalty on attention rows, on their entropies or on their log-sum-exp."""
        return self.training and self.config.penalty is not None

    def _warn_of_a_lost_penalty(self, reason: str):
        if not torch.compiler.is_compiling():
            logger.warning_once(
                f"{reason} in training, so the model gives no loss, and one computed elsewhere (as the Trainer does "
                f"with label_smoothing_factor, and TRL's trainers do) lacks the {self.config.penalty} asks for: give "
                "labels, and smoothing if need be, or output_entropies=True and add the penalty."
            )


class EntropyGPTModel(EntropyGPTPreTrainedModel):
    """The bare model: embeddings, blocks and the final norm."""

    def __init__(self, config: EntropyGPTConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList([EntropyGPTBlock(config, layer_idx) for layer_idx in range(config.n_layer)])
        self.ln_f = build_norm(config.final_normalization, config.n_embd, config.layer_norm_epsilon)
        self.gradient_checkpointing = False

        # Initialize weights and apply final processing
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, new_embeddings: nn.Embedding):
        self.wte = new_embeddings

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_entropies: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EntropyGPTModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Tokens.
            past_key_values (`Cache`, *optional*):
                Keys and values of the tokens before. From transformers 5.24 on, its name is `cache`.
            attention_mask (`torch.Tensor` of shape `(batch_size, past_length + sequence_length)`, *optional*):
                0 at padding; or a 4D mask, boolean or additive as the attention implementation takes it.
            token_type_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens whose embeddings are added to the input's, as in GPT-2.
            position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Positions. With left padding they have to be given, as for GPT-2; `generate` does so.
            inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Embeddings in place of `input_ids`.
            use_cache (`bool`, *optional*): Whether to return keys and values.
            output_entropies (`bool`, *optional*):
                Whether to return the entropies of all attention rows, under any attention implementation.
            kwargs: What transformers hands to every model, such as `output_hidden_states`.

        Raises:
            `ValueError`: If not exactly one of `input_ids` and `inputs_embeds` is given, there is no such position in
                the model, cross-attention is asked for, or entropies of attention that is not causal are; or if the
                attention implementation or a mask can't do what the attention function needs.
            `TypeError`: If a keyword is none of this model's and none that transformers hands to every model.
            `FloatingPointError`: If `detect_divergence` is set and a layer yields a non-finite value in training.
        """
        check_keywords(self, kwargs, past_key_values)
        self._check_inputs(input_ids, inputs_embeds, position_ids)
        if kwargs.pop("output_attentions", None):
            self._warn_of_missing_matrices()
        kwargs.pop("output_hidden_states", None)
        if self.penalizes_rows and output_entropies is None:  # heads of this family say what they need
            self._warn_of_a_lost_penalty("The model is run without its head")
        output_entropies = bool(output_entropies)
        is_given_whole = attention_mask is not None and len(attention_mask.shape) == 4
        # What else than the implementation's own softmax attention has its own needs.
        is_own_attention = output_entropies or self.config.attention_function != "softmax"
        if is_own_attention:
            self._check_own_attention(output_entropies, past_key_values, kwargs)
        if self.config.penalty and output_entropies and is_given_whole and attention_mask.shape[1] > 1:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}: the {self.config.penalty} asks for knows "
                "one mask for all heads, (batch, 1, queries, keys)."
            )

        if inputs_embeds is None:
            self.warn_if_padding_and_no_attention_mask(input_ids, attention_mask)
            inputs_embeds = self.wte(input_ids)
        has_positions = position_ids is not None
        past_length = None  # where it is not asked for, or there is no cache
        if past_key_values is not None and (not has_positions or is_own_attention):
            past_length = past_key_values.get_seq_length()
        if not has_positions:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device).unsqueeze(0)
            if past_length is not None:  # a tensor, in a static cache
                position_ids = position_ids + past_length
        self._check_positions(position_ids)

        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values},
        )
        causal_mask = prepare_mask(
            causal_mask, self.config._attn_implementation, inputs_embeds, is_own_attention, is_given_whole
        )
        if use_cache and past_key_values is None:
            # Not before the mask is made: with a cache, transformers does not look for packed sequences.
            past_key_values = DynamicCache(config=self.config)
        is_flash = "flash" in self.config._attn_implementation
        visible_keys = None
        if output_entropies or (is_flash and is_own_attention):
            given_mask = attention_mask
            if is_given_whole:
                given_mask = causal_mask.expand(-1, -1, inputs_embeds.shape[1], -1)
            visible_keys = count_visible_keys(position_ids, given_mask, past_length)
        if is_flash and is_own_attention and causal_mask is None and past_length is None:
            # Flash attention finds packed sequences by their positions; here it takes a mask.
            causal_mask = self._packed_mask(visible_keys)
        if self.config.weight_normalization == "spectral" and self.training and torch.is_grad_enabled():
            self._update_singular_vectors()

        hidden_states = inputs_embeds + self.wpe(position_ids).to(inputs_embeds.device)
        if token_type_ids is not None:
            hidden_states = hidden_states + self.wte(token_type_ids)
        hidden_states = self.drop(hidden_states)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            past_key_values = None  # recomputation would add the same keys a second time
        attention_entropies, entropy_thresholds, log_sum_deviations = [], [], []
        detect_divergence = self.config.detect_divergence and self.training
        if detect_divergence:
            self._raise_if_not_finite("the embeddings", hidden_states)
        for layer_idx, block in enumerate(self.h):
            hidden_states = block(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                output_entropies=output_entropies,
                use_cache=use_cache,
                **kwargs,
            )
            if output_entropies:
                hidden_states, entropies, thresholds, deviations = self._check_hooked(layer_idx, hidden_states)
                attention_entropies.append(entropies)
                entropy_thresholds.append(thresholds)
                log_sum_deviations.append(deviations)
            if detect_divergence:
                self._raise_if_not_finite(f"layer {layer_idx} (h.{layer_idx})", hidden_states)
        hidden_states = self.ln_f(hidden_states)
        if detect_divergence:
            self._raise_if_not_finite("the final norm (ln_f)", hidden_states)

        has_thresholds = output_entropies and self.config.entropy_regularization
        packed_sequences = None
        may_be_packed = (has_positions and past_length is None) if attention_mask is None else is_given_whole
        has_deviations = output_entropies and self.config.log_sum_coefficient > 0
        if (has_thresholds or has_deviations) and may_be_packed and not past_length:
            packed_sequences = number_sequences(visible_keys, given_mask).to(hidden_states.device)
        return EntropyGPTModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: past_key_values if use_cache else None},
            attention_entropies=tuple(attention_entropies) if output_entropies else None,
            visible_keys=visible_keys if output_entropies else None,
            entropy_thresholds=tuple(entropy_thresholds) if has_thresholds else None,
            log_sum_deviations=tuple(log_sum_deviations) if has_deviations else None,
            packed_sequences=packed_sequences,
        )

    def _check_inputs(self, input_ids, inputs_embeds, position_ids):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of input_ids and inputs_embeds has to be given.")
        length = input_ids.shape[1] if input_ids is not None else inputs_embeds.shape[1]
        if position_ids is None and length > self.config.n_positions:
            raise ValueError(
                f"The sequence has {length} tokens, but this model has n_positions={self.config.n_positions}: "
                "truncate it (tokenizer(..., truncation=True, max_length=...))."
            )

    def _check_own_attention(self, output_entropies: bool, past_key_values, kwargs: dict):
        implementation, function = self.config._attn_implementation, self.config.attention_function
        cause = "output_entropies=True" if output_entropies else f"attention_function={function!r}"
        if kwargs.get("is_causal") is False:
            subject = "entropies are those of" if output_entropies else "shifts are learned with"
            raise ValueError(f"is_causal=False with {cause}: {subject} causal attention.")
        if is_paged(past_key_values) or is_paged(kwargs.get("cache")):
            raise ValueError(f"{cause} is not supported in continuous batching (generate_batch).")
        known = implementation in OWN_IMPLEMENTATIONS or "flash" in implementation
        known = known or serves_every_function(self.config)
        if function != "softmax" and not known:
            raise ValueError(
                f"attn_implementation={implementation!r} computes softmax alone, and the model has "
                f"attention_function={function!r}: call model.set_attn_implementation with one of "
                f"{', '.join(OWN_IMPLEMENTATIONS)}."
            )

    def _warn_of_missing_matrices(self):
        if self.config._attn_implementation != "eager" and not torch.compiler.is_compiling():
            logger.warning_once(
                f"output_attentions=True gives no matrices under attn_implementation="
                f"{self.config._attn_implementation!r}, which does not keep them: call "
                "model.set_attn_implementation('eager') to have them. output_entropies=True gives the entropies of "
                "their rows under every implementation."
            )

    def _check_positions(self, position_ids: torch.Tensor):
        """On a CPU alone: elsewhere, looking at the positions would make the host wait."""
        if position_ids.device.type != "cpu" or is_tracing(position_ids) or not position_ids.numel():
            return
        smallest, largest = (bound.item() for bound in position_ids.aminmax())
        if smallest < 0 or largest >= self.config.n_positions:
            raise ValueError(
                f"position_ids go from {smallest} to {largest}, but this model has n_positions="
                f"{self.config.n_positions}, and so positions 0 to {self.config.n_positions - 1}: generate less, or "
                "truncate the prompt."
            )

    @staticmethod
    def _check_hooked(layer_idx: int, output: torch.Tensor | tuple) -> tuple:
        if torch.is_tensor(output):
            raise ValueError(
                f"A forward hook of h[{layer_idx}] returned a tensor, but the block returns a tuple of hidden states, "
                "entropies and thresholds if entropies are asked for, as in training with entropy_regularization: "
                "return (hidden_states, *output[1:]) in the hook."
            )
        return output

    @staticmethod
    def _packed_mask(visible_keys: torch.Tensor) -> torch.Tensor | None:
        """The mask of sequences packed one after the other, `(batch or 1, 1, length, length)`; `None` without any."""
        index = torch.arange(visible_keys.shape[-1], device=visible_keys.device)
        begins = index + 1 - visible_keys
        if not begins.any():
            return None
        return ((index >= begins[..., None]) & (index <= index[:, None]))[:, None]

    def _update_singular_vectors(self):
        """
        Those of weights that are being trained: with frozen ones the function stays. Once a forward, out of the
        blocks: a block may run twice under gradient checkpointing.
        """
        for module in self.modules():
            if isinstance(module, EntropyGPTNormalizedConv1D) and module.weight.requires_grad:
                module.update_singular_vectors()

    @staticmethod
    def _raise_if_not_finite(name: str, hidden_states: torch.Tensor):
        if not torch.isfinite(hidden_states).all():
            raise FloatingPointError(
                f"Training diverged: non-finite values first appear in the output of {name}. Lower the learning "
                "rate, clip gradients, or turn on ffn_residual_scaling or entropy_regularization."
            )


class EntropyGPTForCausalLM(EntropyGPTHead, EntropyGPTPreTrainedModel, GenerationMixin):
    """The model with a language modelling head, tied to the token embeddings by default."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: EntropyGPTConfig):
        super().__init__(config)
        self.transformer = EntropyGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=config.head_bias)

        # Initialize weights and apply final processing
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_entropies: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        smoothing: float = 0.0,  # the Trainer takes every argument with "label" in its name for labels
        **kwargs: Unpack[TransformersKwargs],
    ) -> EntropyGPTCausalLMOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Tokens to predict, shifted inside the model, so `labels = input_ids`. -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Number of last positions to compute logits for (0: all), or the positions themselves.
            smoothing (`float`, *optional*, defaults to 0.0):
                Part of each label's weight, from 0 to 1, that all tokens of the vocabulary share in the loss, as the
                `Trainer`'s `label_smoothing_factor` has it; `cross_entropy_loss` is without it.
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids:
                As for [`EntropyGPTModel`].
            inputs_embeds, use_cache, output_entropies:
                As for [`EntropyGPTModel`].

        Example:

        ```python
        >>> import torch
        >>> from modeling_entropy_gpt import EntropyGPTConfig, EntropyGPTForCausalLM

        >>> config = EntropyGPTConfig.from_notation("SM+ScFuFFN", n_layer=2, n_embd=32, n_head=4, vocab_size=100)
        >>> model = EntropyGPTForCausalLM(config).eval()
        >>> outputs = model(torch.tensor([[1, 2, 3]]), output_entropies=True)
        >>> outputs.logits.shape, outputs.attention_entropies[0].shape
        (torch.Size([1, 3, 100]), torch.Size([1, 4, 3]))
        ```
        """
        outputs = self.run_base_model(
            labels,
            output_entropies,
            kwargs,
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))

        loss, cross_entropy_loss, entropy_loss, penalized_share, log_sum_loss = None, None, None, None, None
        if labels is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not smoothing):
                cross_entropy_loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = cross_entropy_loss.clone()  # on several ranks, the Trainer multiplies it in place
            ignored = kwargs.get("ignore_index", -100)
            targets = kwargs.get("shift_labels")
            if targets is None:
                targets = nn.functional.pad(labels[..., 1:], (0, 1), value=ignored)
            if smoothing:
                loss = smoothed_cross_entropy(logits, targets, smoothing, kwargs.get("num_items_in_batch"), ignored)
            predicted = (targets != ignored).to(outputs.last_hidden_state.device)
            weights = (predicted, kwargs.get("num_items_in_batch"))
            if outputs.log_sum_deviations is not None:
                log_sum_loss = self.log_sum_loss(outputs, *weights)
                if self.training:
                    loss = loss + self.config.log_sum_coefficient * log_sum_loss.to(loss.device)
            if outputs.attention_entropies is not None and self.config.entropy_regularization:
                entropy_loss = self.entropy_loss(outputs, *weights)
                penalized_share = self.penalized_share(outputs, *weights)
                if self.training:
                    loss = loss + self.config.entropy_coefficient * entropy_loss.to(loss.device)
            self.check_loss(loss)

        return EntropyGPTCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            cross_entropy_loss=cross_entropy_loss,
            entropy_loss=entropy_loss,
            log_sum_loss=log_sum_loss,
            penalized_share=penalized_share,
            **self.handed_on(outputs, output_entropies),
        )


class EntropyGPTForSequenceClassification(EntropyGPTHead, EntropyGPTPreTrainedModel):
    """The model with a linear classification (or regression) head on the last token that is not padding."""

    # The losses of this and the following heads are means over the batch, so the Trainer has to average them itself.
    accepts_loss_kwargs = False

    def __init__(self, config: EntropyGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = EntropyGPTModel(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)

        # Initialize weights and apply final processing
        self.post_init()

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_entropies: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EntropyGPTSequenceClassifierOutput:
        r"""
        Args:
            labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
                Classes, or values for a regression (`config.problem_type`).
            input_ids, past_key_values, attention_mask, token_type_ids, position_ids:
                As for [`EntropyGPTModel`].
            inputs_embeds, use_cache, output_entropies:
                As for [`EntropyGPTModel`].
        """
        outputs = self.run_base_model(
            labels,
            output_entropies,
            kwargs,
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        logits = self.score(outputs.last_hidden_state)
        batch_index = torch.arange(logits.shape[0], device=logits.device)
        pooled_logits = logits[batch_index, self._last_token(input_ids, logits)]

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=pooled_logits, config=self.config)
            loss = self.add_entropy_loss(loss, outputs)

        return EntropyGPTSequenceClassifierOutput(
            loss=loss,
            logits=pooled_logits,
            **{CACHE: getattr(outputs, CACHE)},
            **self.handed_on(outputs, output_entropies),
        )

    def _last_token(self, input_ids: torch.LongTensor | None, logits: torch.Tensor) -> torch.Tensor | int:
        """Index in each sequence of the rightmost token that is not padding, whichever side the padding is on."""
        if self.config.pad_token_id is None:
            if logits.shape[0] > 1:
                raise ValueError(
                    f"A batch of {logits.shape[0]} sequences needs config.pad_token_id, to find each one's end."
                )
            return -1
        if input_ids is None:
            logger.warning_once("inputs_embeds do not show padding: the last position of each sequence is used.")
            return -1
        not_padding = (input_ids != self.config.pad_token_id).to(logits.device, torch.int32)
        return (torch.arange(input_ids.shape[1], device=logits.device, dtype=torch.int32) * not_padding).argmax(dim=-1)


class EntropyGPTForTokenClassification(EntropyGPTHead, EntropyGPTPreTrainedModel):
    """The model with a linear classification head on every token."""

    accepts_loss_kwargs = False

    def __init__(self, config: EntropyGPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.transformer = EntropyGPTModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.n_embd, self.num_labels)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_entropies: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EntropyGPTTokenClassifierOutput:
        r"""
        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): Classes; -100 is ignored.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_entropies:
                As for [`EntropyGPTModel`].
        """
        outputs = self.run_base_model(
            labels,
            output_entropies,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        logits = self.classifier(self.dropout(outputs.last_hidden_state))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config)
            loss = self.add_entropy_loss(loss, outputs)

        return EntropyGPTTokenClassifierOutput(
            loss=loss,
            logits=logits,
            **self.handed_on(outputs, output_entropies),
        )


class EntropyGPTForQuestionAnswering(EntropyGPTHead, EntropyGPTPreTrainedModel):
    """The model with a head that scores each token as the start and as the end of the answer."""

    accepts_loss_kwargs = False

    def __init__(self, config: EntropyGPTConfig):
        super().__init__(config)
        self.transformer = EntropyGPTModel(config)
        self.qa_outputs = nn.Linear(config.n_embd, 2)

        # Initialize weights and apply final processing
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_entropies: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EntropyGPTQuestionAnsweringOutput:
        r"""
        Args:
            start_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*): First tokens of the answers.
            end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*): Last tokens of the answers.
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_entropies:
                As for [`EntropyGPTModel`].
        """
        outputs = self.run_base_model(
            start_positions,
            output_entropies,
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
        )
        start_logits, end_logits = (
            logits.squeeze(-1).contiguous() for logits in self.qa_outputs(outputs.last_hidden_state).split(1, dim=-1)
        )

        loss = None
        if start_positions is not None and end_positions is not None:
            loss = self.loss_function(start_logits, end_logits, start_positions, end_positions, **kwargs)
            loss = self.add_entropy_loss(loss, outputs)

        return EntropyGPTQuestionAnsweringOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            **self.handed_on(outputs, output_entropies),
        )


# Tools that ask transformers which classes have which head find these too: the `Trainer` shifts the labels of causal
# language models when it smooths them, pipelines look for classes that they support.
for head, names in (
    (EntropyGPTForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    (EntropyGPTForSequenceClassification, modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES),
    (EntropyGPTForTokenClassification, modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES),
    (EntropyGPTForQuestionAnswering, modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES),
):
    names[EntropyGPTConfig.model_type] = head.__name__

__all__ = [
    "EntropyGPTForCausalLM",
    "EntropyGPTForQuestionAnswering",
    "EntropyGPTForSequenceClassification",
    "EntropyGPTForTokenClassification",
    "EntropyGPTModel",
    "EntropyGPTPreTrainedModel",
]
