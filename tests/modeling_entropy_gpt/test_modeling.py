"""What every transformers model does, over every architecture: backends, caches, generation, padding, compilation."""

import copy
import itertools
import logging

import pytest
import torch
from transformers import GenerationConfig, StaticCache, pipeline
from transformers.integrations.executorch import convert_and_export_with_cache
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from entropy_gpt.training.tokenizer import train_tokenizer
from modeling_entropy_gpt import (
    EntropyGPTForCausalLM,
    EntropyGPTForQuestionAnswering,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
)
from modeling_entropy_gpt.forward_keywords import CACHE
from tests.architectures import ARCHITECTURES, NO_DROPOUT, SIZES, TABLE_1, make_config, make_model, make_tokens
from tests.slow import slow_but, slow_cases


# One for each way in which the forward pass differs; the whole list is for what is cheap.
REPRESENTATIVES = (
    "SM+LN+G",
    "SM+ScFuFFN",
    "EReg(SM(t)+ScFuFFN)",
    "EReg(SM(t_h)+StaticLN+LearnableLeakyR+ScFFN)",
    "EReg(SM(t)+ScFuFFNi1)",
    "SM+ScFFN+WN(QKV+FFN)",
    "SM+ScFuFFN+SN(QKVO+FFN)",
)
HEADS = (
    EntropyGPTForCausalLM,
    EntropyGPTForSequenceClassification,
    EntropyGPTForTokenClassification,
    EntropyGPTForQuestionAnswering,
)

every_architecture = pytest.mark.parametrize("notation", ARCHITECTURES)
representatives = pytest.mark.parametrize("notation", REPRESENTATIVES)
# Compilation takes its time: the default tests compile the last of the paper's table alone, in one of two ways, and
# all tests compile models of two blocks.
FIRST, LAST = TABLE_1[0], TABLE_1[-1]
FEW = {"n_layer": 2}


def compiled(name: str, ids: list[str]):
    """Parametrises with the representatives, and a flag of this name that is true and false in turn."""
    cases = zip(REPRESENTATIVES, itertools.cycle((True, False)), strict=False)
    return pytest.mark.parametrize(
        ("notation", name),
        [
            pytest.param(*case, id=f"{case[0]}-{ids[case[1]]}", marks=() if case == (LAST, True) else pytest.mark.slow)
            for case in cases
        ],
    )


def assert_close(got, expected, **options):
    torch.testing.assert_close(got, expected, **{"rtol": 1e-4, "atol": 2e-4, **options})


def pad(tokens, side, count=5):
    """The same tokens with padding on one side of all rows but the last, which is longer."""
    padding = torch.full((tokens.shape[0], count), SIZES["pad_token_id"])
    input_ids = torch.cat([padding, tokens] if side == "left" else [tokens, padding], dim=1)
    input_ids = torch.cat([input_ids, make_tokens(1, input_ids.shape[1])])
    mask = (input_ids != SIZES["pad_token_id"]).long()
    return {"input_ids": input_ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def unpad(values, side, count=5):
    """The inverse of `pad`, along dimension 1."""
    return values[:-1, count:] if side == "left" else values[:-1, :-count]


@every_architecture
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_eager_and_sdpa_agree(notation, padding):
    model = make_model(notation)
    inputs = {"input_ids": make_tokens()} if padding is None else pad(make_tokens(), padding)
    outputs = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        plain = model(**inputs).logits
        outputs[implementation] = model(**inputs, output_entropies=True)
        valid = slice(None) if padding is None else inputs["attention_mask"].bool()
        assert_close(plain[valid], outputs[implementation].logits[valid])
    eager, sdpa = outputs["eager"], outputs["sdpa"]
    assert_close(sdpa.logits[valid], eager.logits[valid])
    for layer, (got, expected) in enumerate(zip(sdpa.attention_entropies, eager.attention_entropies, strict=True)):
        assert_close(got.transpose(1, 2)[valid], expected.transpose(1, 2)[valid], msg=f"layer {layer}")


@every_architecture
@pytest.mark.parametrize("padding", [None, "left"])
def test_eager_and_sdpa_train_alike(notation, padding):
    """Loss and the gradient of every parameter, in double precision, with a penalty that matters."""
    model = make_model(notation, **NO_DROPOUT, entropy_coefficient=0.1).double()
    inputs = {"input_ids": make_tokens()} if padding is None else pad(make_tokens(), padding)
    labels = inputs["input_ids"].clone()
    if padding:  # a sequence's first token would be predicted from padding
        labels[inputs["attention_mask"].cumsum(dim=-1) <= 1] = -100
    losses, gradients = {}, {}
    for implementation in ("eager", "sdpa"):
        copied = copy.deepcopy(model).train()  # spectral normalisation follows the weights with every forward pass
        copied.set_attn_implementation(implementation)
        losses[implementation] = copied(**inputs, labels=labels).loss
        losses[implementation].backward()
        gradients[implementation] = {name: parameter.grad for name, parameter in copied.named_parameters()}
    assert_close(losses["sdpa"], losses["eager"], rtol=1e-10, atol=0)
    for name, expected in gradients["eager"].items():
        assert_close(gradients["sdpa"][name], expected, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers sets it
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("notation", "stance"),
    [*((notation, "force_eager") for notation in REPRESENTATIVES), *slow_cases((FIRST, "default"), (LAST, "default"))],
)
def test_flex_and_sdpa_agree(notation, stance):
    """The default tests leave out the compiler, which takes most of a minute: the masks are the same without it."""
    model = make_model(notation, **FEW)
    inputs = pad(make_tokens(), "left")
    valid = inputs["attention_mask"].bool()
    with torch.no_grad(), torch.compiler.set_stance(stance):
        expected = model(**inputs, output_entropies=True)
        model.set_attn_implementation("flex_attention")
        assert_close(model(**inputs).logits[valid], expected.logits[valid])
        got = model(**inputs, output_entropies=True)
    for ours, theirs in zip(got.attention_entropies, expected.attention_entropies, strict=True):
        assert_close(ours.transpose(1, 2)[valid], theirs.transpose(1, 2)[valid])


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs flash-attn")
@representatives
def test_flash_and_sdpa_agree(notation):
    model = make_model(notation).to("cuda", torch.bfloat16)
    inputs = {name: tensor.cuda() for name, tensor in pad(make_tokens(), "left").items()}
    valid = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**inputs, output_entropies=True)
        model.set_attn_implementation("flash_attention_2")
        got = model(**inputs, output_entropies=True)
        assert_close(model(**inputs).logits[valid], expected.logits[valid], rtol=5e-2, atol=5e-1)
    for ours, theirs in zip(got.attention_entropies, expected.attention_entropies, strict=True):
        assert_close(ours.transpose(1, 2)[valid], theirs.transpose(1, 2)[valid], rtol=5e-2, atol=1e-1)


@every_architecture
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(notation, side):
    model = make_model(notation)
    tokens = make_tokens()
    expected = model(tokens, output_entropies=True)
    got = model(**pad(tokens, side), output_entropies=True)
    assert_close(unpad(got.logits, side), expected.logits)
    assert torch.equal(unpad(got.visible_keys, side), expected.visible_keys.expand_as(tokens))
    for ours, theirs in zip(got.attention_entropies, expected.attention_entropies, strict=True):
        assert_close(unpad(ours.transpose(1, 2), side), theirs.transpose(1, 2))


@every_architecture
def test_no_token_sees_a_later_one(notation):
    model = make_model(notation)
    tokens = make_tokens()
    changed = tokens.clone()
    changed[:, 9:] = make_tokens()[:, 9:]
    before, after = model(tokens).logits, model(changed).logits
    assert_close(after[:, :9], before[:, :9])
    assert (after[:, 9:] - before[:, 9:]).abs().max() > 0.1


@every_architecture
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_cached_decoding_is_the_same_as_one_pass(notation, implementation):
    model = make_model(notation)
    model.set_attn_implementation(implementation)
    tokens = make_tokens()
    expected = model(tokens, output_entropies=True)
    cache, logits, entropies = None, [], []
    for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:14], tokens[:, 14:]):
        outputs = model(part, **{CACHE: cache}, use_cache=True, output_entropies=True)
        cache = outputs.get(CACHE)
        logits.append(outputs.logits)
        entropies.append(torch.stack(outputs.attention_entropies))
    assert_close(torch.cat(logits, dim=1), expected.logits)
    assert_close(torch.cat(entropies, dim=-1), torch.stack(expected.attention_entropies))


@representatives
def test_static_cache_is_the_same_as_one_pass(notation):
    model = make_model(notation)
    tokens = make_tokens()
    expected = model(tokens, output_entropies=True)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        cache = StaticCache(config=model.config, max_cache_len=32)
        logits, entropies = [], []
        for part in (tokens[:, :9], tokens[:, 9:10], tokens[:, 10:]):
            outputs = model(part, **{CACHE: cache}, use_cache=True, output_entropies=True)
            logits.append(outputs.logits)
            entropies.append(torch.stack(outputs.attention_entropies))
        assert_close(torch.cat(logits, dim=1), expected.logits)
        assert_close(torch.cat(entropies, dim=-1), torch.stack(expected.attention_entropies))


def test_temperatures_follow_the_position_in_cached_generation_beyond_the_prompt():
    model = make_model("SM(t)+ScFuFFN")
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.temperature.log_temperature.copy_(torch.linspace(-1, 1, SIZES["n_positions"]).expand(4, -1))
    inputs = {name: tensor for name, tensor in pad(make_tokens(), "left").items() if name != "position_ids"}
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    generated = model.generate(**inputs, **options)
    assert torch.equal(generated, model.generate(**inputs, **options, use_cache=False))
    # Each new token is the likeliest one after those before it, computed without cache and without padding.
    alone = generated[0, 5:]
    logits = model(alone[None]).logits[0]
    assert torch.equal(logits[16:-1].argmax(dim=-1), alone[17:])
    # The check above would not notice temperatures that do not matter.
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.temperature.log_temperature.zero_()
    assert not torch.equal(generated, model.generate(**inputs, **options))


@representatives
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beam"],
)
def test_generation_is_the_same_with_and_without_left_padding(notation, options):
    model = make_model(notation)
    tokens = make_tokens(1)
    options = {"max_new_tokens": 8, "eos_token_id": None, **options}
    torch.manual_seed(1)
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert expected.shape == (1, 25)
    inputs = {name: tensor[:1] for name, tensor in pad(tokens, "left").items() if name != "position_ids"}
    torch.manual_seed(1)
    assert torch.equal(model.generate(**inputs, **options)[:, 5:], expected)


def test_generation_with_a_static_cache_is_the_same():
    model = make_model("EReg(SM(t)+ScFuFFN)")
    tokens = make_tokens()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "disable_compile": True}
    mask = torch.ones_like(tokens)
    expected = model.generate(tokens, attention_mask=mask, **options)
    assert torch.equal(model.generate(tokens, attention_mask=mask, cache_implementation="static", **options), expected)


@every_architecture
def test_hidden_states_and_attentions(notation):
    model = make_model(notation)
    model.set_attn_implementation("eager")
    tokens = make_tokens()
    outputs = model(tokens, output_hidden_states=True, output_attentions=True, output_entropies=True)
    assert [states.shape for states in outputs.hidden_states] == [(2, 17, 48)] * 4
    assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    for attention, entropies in zip(outputs.attentions, outputs.attention_entropies, strict=True):
        assert_close(attention.sum(dim=-1), torch.ones(2, 4, 17))
        assert attention.triu(1).eq(0).all()
        assert_close(-torch.special.xlogy(attention, attention).sum(dim=-1), entropies)


def test_attentions_under_sdpa_are_missing_with_a_hint_at_entropies(caplog):
    model = make_model("SM+LN+G")
    model.set_attn_implementation("sdpa")
    transformers_logging.warning_once.cache_clear()
    for _ in range(2):
        assert not model(make_tokens(), output_attentions=True).attentions
    (message,) = (record.getMessage() for record in caplog.records)
    assert "set_attn_implementation('eager')" in message
    assert "output_entropies=True" in message


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_entropies_stay_within_what_the_mask_allows(implementation):
    model = make_model("SM+LN+G")
    model.set_attn_implementation(implementation)
    inputs = pad(make_tokens(), "right")
    outputs = model(**inputs, output_entropies=True)
    largest = outputs.visible_keys.clamp(min=1).log()[:, None]
    for entropies in outputs.attention_entropies:
        valid = (outputs.visible_keys > 0)[:, None].expand_as(entropies)
        assert (entropies[valid] <= largest.expand_as(entropies)[valid] + 1e-5).all()
        assert (entropies[valid] >= -1e-6).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long), "inputs_embeds": torch.ones(1, 3, 48)}, "Exactly one"),
        ({"input_ids": torch.ones(1, 65, dtype=torch.long)}, "65 tokens.*n_positions=64"),
        (
            {"input_ids": torch.ones(1, 2, dtype=torch.long), "position_ids": torch.tensor([[63, 64]])},
            "from 63 to 64.*n_positions=64",
        ),
    ],
)
def test_bad_inputs_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model("SM+LN+G")(**arguments)


@representatives
def test_embeddings_in_place_of_tokens(notation):
    model = make_model(notation)
    tokens = make_tokens()
    embeddings = model.get_input_embeddings()(tokens)
    assert_close(model(inputs_embeds=embeddings).logits, model(tokens).logits, rtol=0, atol=0)


def test_logits_to_keep():
    model = make_model("SM+LN+G")
    tokens = make_tokens()
    assert_close(model(tokens, logits_to_keep=2).logits, model(tokens).logits[:, -2:])


def test_packed_sequences_do_not_see_each_other():
    model = make_model("EReg(SM(t)+ScFuFFN)")
    tokens = make_tokens(1, 20)
    position_ids = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = model(tokens, position_ids=position_ids, output_entropies=True, use_cache=False)
    for part in (slice(0, 12), slice(12, 20)):
        alone = model(tokens[:, part], output_entropies=True)
        assert_close(packed.logits[:, part], alone.logits)
        assert torch.equal(packed.visible_keys[:, part], alone.visible_keys)


@representatives
def test_resizing_and_tying_embeddings(notation):
    model = make_model(notation)
    tokens = make_tokens()
    expected = model(tokens).logits
    model.resize_token_embeddings(SIZES["vocab_size"] + 10, mean_resizing=False)
    assert model.config.vocab_size == model.lm_head.out_features == SIZES["vocab_size"] + 10
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_close(model(tokens).logits[..., : SIZES["vocab_size"]], expected)
    assert model(tokens, labels=tokens).loss.isfinite()

    untied = make_model(notation, tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.get_input_embeddings().weight


@representatives
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(notation, dtype):
    model = make_model(notation)
    tokens = make_tokens()
    expected = model(tokens).logits
    outputs = model.to(dtype)(tokens, output_entropies=True, labels=tokens)
    assert outputs.logits.dtype == dtype
    assert outputs.attention_entropies[0].dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([outputs.logits.float().flatten(), expected.flatten()]))[0, 1]
    assert correlation > (0.999 if dtype == torch.float16 else 0.98)
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@compiled("training", ["eval", "train"])
def test_compiles_to_one_graph(notation, training):
    torch._dynamo.reset()
    model = make_model(notation, **FEW, **NO_DROPOUT).train(training)
    tokens = make_tokens()
    # A copy, since spectral normalisation follows the weights with every forward pass in training.
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    expected, got = model(tokens, labels=tokens), compiled(tokens, labels=tokens)
    assert_close(got.loss, expected.loss)
    assert_close(got.logits, expected.logits)


@compiled("output_entropies", ["logits", "entropies"])
def test_exports_for_every_batch_and_length(notation, output_entropies):
    model = make_model(notation, **FEW)
    model.config.use_cache = False
    inputs = {"input_ids": make_tokens(), "output_entropies": output_entropies}
    sizes = {0: torch.export.Dim("batch", max=8), 1: torch.export.Dim("length", min=3, max=SIZES["n_positions"])}
    dynamic_shapes = {"input_ids": sizes, "output_entropies": None}
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes, strict=False)
    inputs["input_ids"] = make_tokens(3, 29)
    got, expected = program.module()(**inputs), model(**inputs)
    assert_close(got.logits, expected.logits)
    if output_entropies:
        assert_close(torch.stack(got.attention_entropies), torch.stack(expected.attention_entropies))


@pytest.mark.parametrize("notation", slow_but((LAST,), (FIRST, LAST)))
def test_exports_with_a_cache(notation):
    """As for a phone: token by token, with the keys and values inside the program."""
    model = make_model(notation, **FEW)
    model.generation_config = GenerationConfig(
        use_cache=True, cache_implementation="static", cache_config={"batch_size": 1, "max_cache_len": 32}
    )
    program = convert_and_export_with_cache(model, torch.tensor([[5]]), torch.tensor([0])).module()
    tokens = make_tokens(1, 6)
    logits = [program(input_ids=tokens[:, i : i + 1], cache_position=torch.tensor([i])) for i in range(6)]
    assert_close(torch.cat(logits, dim=1), model(tokens).logits)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("notation", ["SM+LN+G", "EReg(SM(t)+ScFuFFN)"])
def test_heads_train_and_answer(head, notation):
    model = make_model(notation, head, num_labels=3, **NO_DROPOUT)
    tokens = make_tokens()
    labels = {
        EntropyGPTForCausalLM: {"labels": tokens},
        EntropyGPTForSequenceClassification: {"labels": torch.tensor([0, 2])},
        EntropyGPTForTokenClassification: {"labels": torch.randint(3, tokens.shape)},
        EntropyGPTForQuestionAnswering: {"start_positions": tokens[:, 0] % 9, "end_positions": tokens[:, 1] % 9},
    }[head]
    evaluated = model(tokens, **labels).loss
    trained = model.train()(tokens, **labels).loss
    trained.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # In training alone the penalty is part of the loss.
    assert (trained > evaluated) == model.config.entropy_regularization
    assert model(tokens, **labels, return_dict=False)[0] == trained


@pytest.mark.parametrize("head", HEADS)
def test_every_head_returns_entropies_when_asked_alone(head):
    model = make_model("EReg(SM(t)+ScFuFFN)", head).train()
    tokens = make_tokens()
    outputs = model(tokens, output_entropies=True)
    assert [entropies.shape for entropies in outputs.attention_entropies] == [(2, 4, 17)] * 3
    assert outputs.visible_keys.shape == (1, 17)
    for outputs in (model(tokens), model.transformer(tokens)):
        assert outputs.attention_entropies is outputs.visible_keys is None


def test_training_without_labels_warns_that_the_penalty_is_lost(caplog):
    tokens = make_tokens()
    logging.Logger.warning_once.cache_clear()
    logging.getLogger("transformers").propagate = True
    try:
        make_model("EReg(SM(t)+ScFuFFN)").train()(tokens, labels=tokens)
        make_model("SM(t)+ScFuFFN").train()(tokens)
        assert not caplog.messages
        make_model("EReg(SM(t)+ScFuFFN)").train()(tokens)
    finally:
        logging.getLogger("transformers").propagate = False
    assert ["lacks the entropy penalty" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequence_classification_reads_the_last_token_that_is_no_padding(side):
    model = make_model("SM+LN+G", EntropyGPTForSequenceClassification, num_labels=3)
    tokens = make_tokens()
    assert_close(model(**pad(tokens, side)).logits[:-1], model(tokens).logits)


def test_sequence_classification_of_a_batch_without_pad_token_is_refused():
    model = make_model("SM+LN+G", EntropyGPTForSequenceClassification, pad_token_id=None)
    model(make_tokens(1))
    with pytest.raises(ValueError, match="pad_token_id"):
        model(make_tokens(2))


def test_text_generation_pipeline():
    tokenizer = train_tokenizer(["def main():\n    return 1\n"] * 3, vocab_size=300)
    config = make_config("EReg(SM(t)+ScFuFFN)", vocab_size=len(tokenizer))
    generator = pipeline("text-generation", model=EntropyGPTForCausalLM(config), tokenizer=tokenizer)
    prompts = ["def main", "d"]
    texts = [text[0]["generated_text"] for text in generator(prompts, max_new_tokens=5, batch_size=2)]
    assert all(text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True))


def test_detect_divergence_names_the_layer():
    model = make_model("SM+ScFFN", detect_divergence=True).train()
    tokens = make_tokens()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"layer 1 \(h\.1\)"):
        model(tokens, labels=tokens)
    model.eval()(tokens, labels=tokens)  # evaluation goes on, so that the model can be looked at
    model.config.detect_divergence = False
    model.train()(tokens, labels=tokens)


def test_detect_divergence_tells_a_bad_head_from_a_bad_layer():
    model = make_model("SM+ScFFN", detect_divergence=True, tie_word_embeddings=False).train()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="The loss is nan while the hidden states of every layer are finite"):
        model(make_tokens(), labels=make_tokens())
