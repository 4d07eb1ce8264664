"""Differentiable generation against a naive second way and against finite differences."""

from __future__ import annotations

import functools

import pytest
import torch

from conftest import ARCHITECTURES, INSTRUCTION
from promptembedder.model import prompter as prompting
from promptembedder.model.leaves import SoftPromptLeaves, TrainingState


def naive_generation(lm, ids, K, temperature):
    """No cache, no padding, one request: the whole sequence again for every soft token."""
    table = lm.get_input_embeddings()
    embeddings = table(torch.arange(table.weight.shape[0]))  # what the LLM feeds itself, any scaling included
    sequence = table(ids)[None]
    for _ in range(K):
        logits = lm(inputs_embeds=sequence, use_cache=False).logits[0, -1]
        token = torch.softmax(logits / temperature, dim=-1) @ embeddings
        sequence = torch.cat([sequence, token[None, None]], dim=1)
    return sequence[0, -K:]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generation_equals_the_naive_way(tiny_model, architecture):
    module = tiny_model(architecture, num_soft_tokens=4, softmax_temperature=0.7)[0]
    ids, mask = module.prompter.tokenize([INSTRUCTION])
    generated = module.prompter(ids, mask).tokens_NKP[0]
    naive = naive_generation(module.prompter.lm, ids[0], 4, 0.7)
    assert torch.allclose(generated, naive, atol=1e-5)
    assert generated.norm(dim=-1).min() > 0.1  # not all-zero embeddings that agree by accident


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_requests_do_not_depend_on_their_batch(tiny_model, architecture):
    prompter = tiny_model(architecture)[0].prompter
    requests = [INSTRUCTION, "Short.", "Given a question, retrieve questions that ask the same thing, in any words."]
    together = prompter(*prompter.tokenize(requests)).tokens_NKP
    for n, request in enumerate(requests):
        alone = prompter(*prompter.tokenize([request])).tokens_NKP[0]
        assert torch.allclose(together[n], alone, atol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """How many passes each generation at once took."""
    made, generate = [], prompting.soft_tokens_at_once

    def counted(*arguments):
        found = generate(*arguments)
        made.append(found[1])
        return found

    monkeypatch.setattr(prompting, "soft_tokens_at_once", counted)
    return made


REQUESTS = [INSTRUCTION, "Short.", "Given a question, retrieve questions that ask the same thing, in any words."]


@pytest.mark.parametrize("temperature", [0.05, 0.7])
@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_at_once_is_as_in_turn(tiny_model, passes, architecture, opened, temperature):
    prompter = tiny_model(architecture, num_soft_tokens=4, softmax_temperature=temperature)[0].prompter
    prompter.lm.config.get_text_config(decoder=True).sliding_window = 64  # a tiny model's is shorter than a request
    with torch.no_grad():
        opening = prompter.read_opening() if opened else None
        for some in (REQUESTS, REQUESTS[:1]):
            ids, mask = prompter.tokenize(some)
            expected = prompter(ids, mask, opening)
            for draft in ([1, 2, 3], expected.weights_NKV[0, :3].argmax(-1).tolist()):
                prompter.take_draft(draft)
                found = prompter(ids, mask, opening, at_once=True)
                # A peaked softmax makes more of what still moves when all is at rest.
                assert torch.allclose(found.tokens_NKP, expected.tokens_NKP, atol=1e-4 if temperature < 0.1 else 1e-5)
                assert torch.allclose(found.weights_NKV, expected.weights_NKV, atol=1e-4 if temperature < 0.1 else 1e-5)
    assert len(passes) == 4
    assert all(1 <= count <= 4 for count in passes)


def test_all_at_once_in_bfloat16(tiny_model):
    prompter = tiny_model(num_soft_tokens=4, dtype="bfloat16")[0].prompter
    prompter.take_draft([1, 2, 3])
    with torch.no_grad():
        ids, mask = prompter.tokenize(REQUESTS)
        expected, found = prompter(ids, mask), prompter(ids, mask, at_once=True)
    size = float(expected.tokens_NKP.abs().max())
    assert torch.allclose(found.tokens_NKP, expected.tokens_NKP, atol=0.02 * size)  # some last bits


def test_a_request_at_rest_waits_for_nobody(tiny_model, passes):
    """Its soft tokens do not depend on how long others of the batch take."""
    prompter = tiny_model(num_soft_tokens=5)[0].prompter
    prompter.temperature = 1e-4  # one word a soft token
    first, others = prompter.tokenize(REQUESTS[:1]), prompter.tokenize(REQUESTS)
    with torch.no_grad():
        prompter.take_draft(prompter(*first).weights_NKV[0, :-1].argmax(-1).tolist())
        alone, together = prompter(*first, at_once=True), prompter(*others, at_once=True)
    assert passes[0] == 1
    assert passes[1] > 1
    assert torch.allclose(alone.tokens_NKP[0], together.tokens_NKP[0], atol=1e-6)


def test_soft_tokens_are_generated_in_turn_where_they_must_be(tiny_model, passes):
    module = tiny_model(num_soft_tokens=5, softmax_temperature=1e-3)[0]
    draft = module.prompter.draft_of(INSTRUCTION, INSTRUCTION)
    passes.clear()
    assert len(draft) == 4
    assert module.prompter.draft_ids is None  # found, not taken
    module.soft_prompt("No draft.")
    module.prompter.take_draft(draft)
    ids, mask = module.prompter.tokenize([INSTRUCTION])
    length = ids.shape[1] + 5
    with torch.no_grad():
        module.prompter(ids, mask)
        module.prompter(ids.repeat(26, 1), mask.repeat(26, 1), at_once=True)  # 130 soft tokens
        module.prompter.lm.config.sliding_window = length - 1
        module.prompter(ids, mask, at_once=True)
        module.prompter.lm.config.sliding_window = None
        with module.in_training(TrainingState(leaves=SoftPromptLeaves())):
            module.soft_prompt("In a training step.")
    module.soft_prompt("With gradients.")
    assert not passes
    with torch.no_grad():
        module.soft_prompt("Here it is of use.")
        module.prompter.lm.config.sliding_window = length
        module.prompter(ids, mask, at_once=True)
    assert len(passes) == 2


def test_a_draft_of_no_use_is_none(tiny_model, monkeypatch):
    prompter = tiny_model(num_soft_tokens=4)[0].prompter
    monkeypatch.setattr(prompting, "soft_tokens_at_once", lambda *_: (None, 3))
    assert prompter.draft_of(INSTRUCTION, "Short.") is None
    assert tiny_model(num_soft_tokens=1)[0].prompter.draft_of(INSTRUCTION, "Short.") is None


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_what_requests_begin_with_is_read_once_and_gradients_pass_through_it(tiny_model, architecture):
    prompter = tiny_model(architecture, num_soft_tokens=2)[0].prompter
    requests = [INSTRUCTION, "Short.", INSTRUCTION + " In brief."]
    read = []
    embedding = prompter.lm.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda _, arguments, __: read.append(arguments[0].numel()))

    def gradients(batches):
        prompter.zero_grad()
        for batch in batches:
            prompter(*prompter.tokenize(batch)).tokens_NKP.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in prompter.parameters() if p.grad is not None])

    together = gradients([requests])
    tokens, (opening, rest) = prompter.tokenize(requests)[0].numel(), read
    assert opening > 1
    assert rest == tokens - len(requests) * opening
    hook.remove()
    alone = gradients([[request] for request in requests])
    assert alone.norm() > 0
    assert torch.allclose(together, alone, atol=1e-4 * float(alone.abs().max()))


@pytest.mark.parametrize("requests", [["to be", "to be\nor not"], ["to be", "to be"], ["to be", "or not"]])
def test_a_request_that_begins_another(tiny_model, requests):
    prompter = tiny_model()[0].prompter
    prompter.tokenizer.chat_template = None
    together = prompter(*prompter.tokenize(requests)).tokens_NKP
    for n, request in enumerate(requests):
        assert torch.allclose(together[n], prompter(*prompter.tokenize([request])).tokens_NKP[0], atol=1e-5)


def test_different_instructions_give_different_soft_tokens(tiny_model):
    prompter = tiny_model()[0].prompter
    first, second = prompter(*prompter.tokenize([INSTRUCTION, "Find the topic."])).tokens_NKP
    assert (first - second).abs().max() > 1e-3


def test_low_temperature_gives_single_embeddings(tiny_model):
    module = tiny_model(softmax_temperature=1e-6)[0]
    tokens, weights = module.prompter(*module.prompter.tokenize([INSTRUCTION]))
    expected = module.prompter.lm.get_input_embeddings()(weights[0].argmax(-1))
    assert torch.allclose(tokens[0], expected, atol=1e-5)


def test_chat_template_is_used_when_there_is_one(tiny_model):
    with_template, without = tiny_model("llama")[0].prompter, tiny_model("gemma3")[0].prompter
    decoded = with_template.tokenizer.decode(with_template.tokenize([INSTRUCTION])[0][0])
    assert decoded.startswith("<|start|>user\n" + INSTRUCTION)
    assert decoded.endswith("<|start|>assistant\n")
    assert INSTRUCTION in without.tokenizer.decode(without.tokenize([INSTRUCTION])[0][0])


@pytest.mark.parametrize(
    "today",
    [
        "{{ strftime_now('%d %b %Y') }}",
        "{%- if strftime_now is defined %}{%- set day = strftime_now('%d %b %Y') %}{%- endif %}{{- day }}",
    ],
)
def test_a_template_that_prints_the_date_prints_the_same_one_every_day(tiny_model, today):
    prompter = tiny_model()[0].prompter
    prompter.tokenizer.chat_template = today + " {% for m in messages %}{{ m.content }}{% endfor %}"
    decoded = prompter.tokenizer.decode(prompter.tokenize([INSTRUCTION])[0][0])
    assert decoded == f"26 Jul 2024 {INSTRUCTION}"


def test_long_requests_are_cut(tiny_model):
    prompter = tiny_model(max_instruction_tokens=5)[0].prompter
    long, longer = prompter.tokenize(["word " * 50])[0], prompter.tokenize(["word " * 500])[0]
    assert torch.equal(long, longer)


def float64_norm(norm, x):
    """Transformers computes its norms in float32 whatever the dtype, too coarse for finite differences."""
    gemma = type(norm).__name__.startswith("Gemma")
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + (norm.eps if gemma else norm.variance_epsilon))
    return scaled * (1 + norm.weight if gemma else norm.weight)


@pytest.mark.parametrize("layout", ["prefix", "suffix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_through_all_steps_against_finite_differences(tiny_model, architecture, layout):
    """Float64, central differences along random directions, through K steps, alignment and backbone."""
    module = tiny_model(architecture, layout=layout, num_soft_tokens=3, softmax_temperature=2.0)[0].double()
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = functools.partial(float64_norm, part)
    features = module.preprocess(["A man plays.", "Rain on the town"], prompt=INSTRUCTION)
    direction_E = torch.randn(module.get_embedding_dimension(), generator=torch.Generator().manual_seed(3)).double()

    def objective():
        return (module(features)["sentence_embedding"] @ direction_E).sum()

    objective().backward()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert {n.split(".")[0] for n in trained} == {"prompter", "alignment"}
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
    for part in ("prompter", "alignment"):
        step = {n: torch.randn_like(p) for n, p in trained.items() if n.startswith(part)}
        analytic = sum((trained[n].grad * d).sum() for n, d in step.items())
        epsilon, values = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                for n, d in step.items():
                    trained[n].add_(sign * epsilon * d)
                values.append(objective())
                for n, d in step.items():
                    trained[n].sub_(sign * epsilon * d)
        numeric = (values[0] - values[1]) / (2 * epsilon)
        assert abs(analytic) > 1e-6
        assert torch.isclose(analytic, numeric, rtol=1e-5), (part, analytic, numeric)


def test_gradient_reaches_every_soft_token(tiny_model):
    """The prompter's gradient has a share from each of the K steps."""
    module = tiny_model(num_soft_tokens=4)[0]
    weight = module.prompter.lm.get_input_embeddings().weight.requires_grad_()
    shares = []
    for k in range(4):
        tokens = module.soft_tokens(INSTRUCTION).tokens_NKP
        (grad,) = torch.autograd.grad(tokens[0, k].sum(), weight)
        shares.append(grad.norm())
    assert min(shares) > 0
    assert len({round(float(s), 6) for s in shares}) == 4


def test_an_instruction_that_is_cut_is_said(tiny_model, caplog):
    prompter = tiny_model(max_instruction_tokens=8)[0].prompter
    for _ in range(2):
        prompter.tokenize(["one two three four five six seven eight nine ten eleven twelve"])
    assert len([record for record in caplog.records if "is read up to 8" in record.message]) == 1
