"""The language model: starting from a Llama, training, saving, and sampling with and without the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM, Qwen2Config

from small_model import small_config
from small_pipeline import byte_tokenizer
from tokenflow import TokenFlowForTextToImage, TokenFlowModel, TokenFlowTextToImageConfig
from tokenflow.errors import UserError
from tokenflow.generation import modeling
from tokenflow.generation.modeling import cut_padding, join_prefixes
from tokenflow.generation.predictor import CachedPredictor
from tokenflow.generation.prompt import encode_prompts
from tokenflow.generation.sampler import KnownTokens

CODES = torch.randint(0, 64, (2, 21), generator=torch.Generator().manual_seed(0))
PROMPTS = ["a hat", "a small red boat"]


def small_llama(**options) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**({"vocab_size": 259} | sizes | options)))


def build(seed: int = 0, **tokenizer_options) -> TokenFlowForTextToImage:
    torch.manual_seed(seed)
    tokenizer = TokenFlowModel(small_config(**tokenizer_options))
    return TokenFlowForTextToImage.from_llama(small_llama(), byte_tokenizer(), tokenizer, 24).eval()


@pytest.fixture(scope="module")
def model() -> TokenFlowForTextToImage:
    return build()


@pytest.fixture(scope="module")
def prompts(model) -> tuple[torch.Tensor, torch.Tensor]:
    return encode(model, PROMPTS)


def encode(model, texts) -> tuple[torch.Tensor, torch.Tensor]:
    tokenizer = byte_tokenizer()
    modeling.add_pad_token(tokenizer)
    return encode_prompts(tokenizer, texts, model.config.max_text_tokens, model.config.image_open_ids)


# ---------------------------------------------------------------------------------------------- beginning
def test_it_starts_from_a_llama():
    torch.manual_seed(0)
    llama = small_llama(tie_word_embeddings=True)
    text_tokenizer, tokenizer = byte_tokenizer(), TokenFlowModel(small_config())
    model = TokenFlowForTextToImage.from_llama(llama, text_tokenizer, tokenizer, 24)
    config = model.config
    assert (config.text_vocab_size, config.full_vocab_size, config.pad_token_id) == (260, 324, 259)
    assert text_tokenizer.pad_token == "[PAD]"
    assert text_tokenizer.decode(config.image_open_ids) == "<img>"
    assert text_tokenizer.decode(config.image_close_ids) == "</img>"
    theirs, ours = llama.state_dict(), model.state_dict()
    embedding, head = ours["model.embed_tokens.weight"], ours["lm_head.weight"]
    for table in (embedding, head):
        assert torch.equal(table[:259], theirs["model.embed_tokens.weight"])
        torch.testing.assert_close(table[259], theirs["model.embed_tokens.weight"].mean(0))
    assert head[260:].std().item() == pytest.approx(0.2, rel=0.1)
    for old, new in (
        ("self_attn.q_proj", "self_attn.q_proj"),
        ("mlp.down_proj", "mlp.down_proj"),
        ("input_layernorm", "post_attention_layernorm"),
        ("post_attention_layernorm", "post_feedforward_layernorm"),
    ):
        assert torch.equal(ours[f"model.layers.1.{new}.weight"], theirs[f"model.layers.1.{old}.weight"])
    torch.testing.assert_close(ours["code_table.codes"], tokenizer.quantizer.quantizer.codes())
    assert not model.code_table.codes.requires_grad
    assert model.model.scale_embedding.weight.std().item() == pytest.approx((3 * 32) ** -0.5, rel=0.2)
    for linear in (model.model.visual_projector.linear_1, model.model.visual_projector.linear_2):
        assert linear.weight.std().item() == pytest.approx((3 * linear.in_features) ** -0.5, rel=0.1)
        assert linear.bias.abs().max() > 0


def test_a_tokenizer_with_fewer_tokens_than_the_table(tmp_path):
    """[PAD] takes a row that the table has already."""
    tokenizer = TokenFlowModel(small_config())
    small_llama(vocab_size=320).save_pretrained(tmp_path)
    model = TokenFlowForTextToImage.from_llama(tmp_path, byte_tokenizer(), tokenizer, 24)
    assert (model.config.text_vocab_size, model.config.pad_token_id) == (320, 259)


def test_another_kind_of_language_model_is_refused(tmp_path):
    Qwen2Config(vocab_size=8).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a 'qwen2' model; this one starts from a 'llama'"):
        TokenFlowForTextToImage.from_llama(tmp_path, byte_tokenizer(), TokenFlowModel(small_config()))


def test_a_model_without_codes_says_so():
    model = TokenFlowForTextToImage(build().config)
    with pytest.raises(UserError, match="call set_codebooks"):
        model(*encode(model, PROMPTS), CODES)
    with pytest.raises(UserError, match="call set_codebooks"):
        model.generate_indices(*encode(model, PROMPTS))
    with pytest.raises(UserError, match=r"the tokenizer has scales \[1, 4\], this model \[1, 2, 4\]"):
        model.set_codebooks(TokenFlowModel(small_config(scales=[1, 4])))
    with pytest.raises(UserError, match=r"codes must be \[64, 40\]"):
        model.set_codebooks(TokenFlowModel(small_config(codebook_size=32)))


def test_saving_and_loading_gives_every_tensor_back(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert type(again) is TokenFlowForTextToImage
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.scales, config.text_vocab_size) == ([1, 2, 4], 260)
    assert again.state_dict().keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    half = TokenFlowForTextToImage.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(half.code_table.codes, model.code_table.codes)
    assert model.code_table.codes.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1"),
        ({"scales": [2, 1]}, "scales: must be positive and rise"),
        ({"flow_dims": []}, "flow_dims must be positive"),
        ({"image_open_ids": [5, 300]}, r"image_open_ids\[1\] is 300; the text vocabulary has ids 0 to 259"),
        ({"bos_token_id": None}, "bos_token_id is None"),
        ({"text_config": Qwen2Config()}, "text_config must be a LlamaConfig, got Qwen2Config"),
    ],
)
def test_configurations_that_make_no_sense(model, change, message):
    with pytest.raises(UserError, match=message):
        TokenFlowTextToImageConfig(**(model.config.to_dict() | change))


# ------------------------------------------------------------------------------------------------- inputs
def test_inputs_are_those_of_the_tokenizer(model):
    tokenizer = TokenFlowModel(small_config())
    model.set_codebooks(tokenizer)
    torch.testing.assert_close(
        model.code_table.all_inputs(CODES), tokenizer.quantizer.next_scale_inputs(CODES).detach()
    )


# ----------------------------------------------------------------------------------------------- training
def test_losses(model, prompts):
    out = model(*prompts, CODES, text_loss=True)
    closing = len(model.config.image_close_ids) + 1
    assert out.nll.shape == (2, 21 + closing)
    torch.testing.assert_close(out.nll.mean(), out.loss_vision)
    torch.testing.assert_close(out.loss, out.loss_vision + out.loss_text)
    assert model(*prompts, CODES.int()).loss_text is None


def test_the_loss_does_not_depend_on_neighbours_or_padding(model, prompts):
    both = model(*prompts, CODES)
    ids, mask = (x[:1] for x in prompts)
    wide = torch.nn.functional.pad(ids, (9, 0), value=3), torch.nn.functional.pad(mask, (9, 0))
    for alone in (model(ids, mask, CODES[:1]), model(*wide, CODES[:1])):
        torch.testing.assert_close(alone.nll[0], both.nll[0], atol=1e-5, rtol=0)


def test_a_code_is_not_seen_by_its_own_scale_or_those_before(model, prompts):
    other = CODES.clone()
    other[:, 7] = (other[:, 7] + 1) % 64  # of the last scale, after which no codes are taken in
    a, b = (model(*prompts, codes).nll for codes in (CODES, other))
    assert torch.equal(a[:, :7], b[:, :7])
    assert torch.equal(a[:, 8:], b[:, 8:])
    other = CODES.clone()
    other[:, 2] = (other[:, 2] + 1) % 64
    c = model(*prompts, other).nll
    assert torch.equal(a[:, :2], c[:, :2])
    assert torch.equal(a[:, 3:5], c[:, 3:5])
    assert not torch.equal(a[:, 5:], c[:, 5:])


def test_a_loss_in_pieces_is_the_same(model, prompts, monkeypatch):
    losses, gradients = [], []
    for size in (modeling.LOGITS_AT_A_TIME, 5 * model.config.full_vocab_size):
        monkeypatch.setattr(modeling, "LOGITS_AT_A_TIME", size)
        model.zero_grad()
        out = model(*prompts, CODES, text_loss=True)
        out.loss.backward()
        losses.append(out.loss.detach())
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    model.zero_grad()


def test_checkpointed_training_and_autocast(model, prompts):
    expected = model(*prompts, CODES).loss
    checkpointed = build()
    checkpointed.activation_checkpointing_enable()
    loss = checkpointed.train()(*prompts, CODES).loss
    loss.backward()
    torch.testing.assert_close(loss, build()(*prompts, CODES).loss)
    assert checkpointed.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(*prompts, CODES).loss, expected, atol=0.1, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same_loss(model, prompts):
    expected = model(*prompts, CODES).nll
    model.set_attn_implementation("flex_attention")
    try:
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            torch.testing.assert_close(model(*prompts, CODES).nll, expected, atol=1e-4, rtol=0)
    finally:
        model.set_attn_implementation("sdpa")


def test_shapes_that_do_not_fit(model, prompts):
    ids, mask = prompts
    with pytest.raises(UserError, match=r"codes must be \[2, 21\] here, got \[2, 20\]"):
        model(ids, mask, CODES[:, :20])
    with pytest.raises(UserError, match="input_ids and attention_mask must both be"):
        model(ids, mask[:, 1:], CODES)
    with pytest.raises(UserError, match="prompts are padded on the left"):
        model(ids.flip(1), mask.flip(1), CODES)


# ----------------------------------------------------------------------------------------------- sampling
def test_prefixes_are_joined_without_needless_padding():
    one = torch.tensor([[9, 9, 1, 2]]), torch.tensor([[0, 0, 1, 1]])
    two = torch.tensor([[9, 3, 4, 5]]), torch.tensor([[0, 1, 1, 1]])
    assert cut_padding(*one)[0].tolist() == [[1, 2]]
    ids, real = join_prefixes([one, two])
    assert ids[:, 1:].tolist() == [[1, 2], [4, 5]]
    assert real.tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": (20, 5, 1)}, {"guidance_scale": 0.0}])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_cache_changes_nothing(model, prompts, options, batch_size):
    results = [
        model.generate_indices(*prompts, seed=[1, 2], use_cache=cached, batch_size=batch_size, **options)
        for cached in (True, False)
    ]
    assert torch.equal(*results)
    assert results[0].shape == (2, 21)
    assert results[0].min() >= 0
    assert results[0].max() < 64


def test_refinements_leave_no_trace_in_the_cache(model, prompts):
    """Later scales see the same whatever a refinement pass is fed."""
    ids, real = join_prefixes([prompts])
    features = torch.randn(2, 21, 40)
    results = []
    for refinements in (0, 2):
        predictor = CachedPredictor(model, ids, real)
        with torch.no_grad():
            predictor.step(0, None, keep=True)
            predictor.step(1, features[:, 1:5], keep=True)
            for _ in range(refinements):
                predictor.step(1, torch.randn(2, 4, 40), keep=False)
            results.append(predictor.step(2, features[:, 5:], keep=True))
            for _ in range(refinements):
                predictor.step(2, torch.randn(2, 16, 40), keep=False)
            results.append(predictor.step(2, features[:, 5:], keep=False))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-6, rtol=0)


def test_positions_computed(model, prompts):
    cached = CachedPredictor(model, *join_prefixes([prompts]))
    with torch.no_grad():
        assert cached.step(0, None, True).shape == (2, 1, 64)  # only codes, only this scale
        assert cached.step(1, torch.randn(2, 4, 40), True).shape == (2, 4, 64)
        cached.step(1, torch.randn(2, 4, 40), False)
    longest = len(PROMPTS[1]) + 1 + len(model.config.image_open_ids)
    assert cached.positions == longest + 4 + 4


def test_codes_depend_on_the_seed_alone(model):
    """Bitwise on a CPU: whatever the batch, the place in it, the padding of neighbours."""
    texts = ["a hat", "a small red boat", "", "the lake"]
    ids, mask = encode(model, texts)
    options = {"guidance_scale": 3.0, "top_k": (30, 10, 1)}
    together = model.generate_indices(ids, mask, seed=[5, 6, 7, 8], **options)
    for row in range(4):
        alone = model.generate_indices(ids[row : row + 1], mask[row : row + 1], seed=5 + row, **options)
        assert torch.equal(alone[0], together[row])
        unpadded = cut_padding(ids[row : row + 1], mask[row : row + 1])
        assert torch.equal(model.generate_indices(*unpadded, seed=[5 + row], **options)[0], together[row])
    turned = model.generate_indices(ids.flip(0), mask.flip(0), seed=[8, 7, 6, 5], **options)
    assert torch.equal(turned.flip(0), together)
    batched = model.generate_indices(ids, mask, seed=[5, 6, 7, 8], batch_size=3, **options)
    assert torch.equal(batched, together)
    assert not torch.equal(model.generate_indices(ids, mask, seed=4, **options), together)


def test_the_logits_are_bitwise_the_same_for_any_batch(model):
    """One prompt at a time on a CPU: the same shapes, so the same numbers."""
    ids, mask = encode(model, ["a hat", "a small red boat on a lake"])
    seen = []
    original = TokenFlowForTextToImage.visual_logits
    for rows in (slice(0, 1), slice(0, 2)):
        logits = []
        model.visual_logits = lambda hidden, into=logits: into.append(original(model, hidden)) or into[-1]
        model.generate_indices(ids[rows], mask[rows], seed=3)
        seen.append(logits)
    del model.visual_logits
    for alone, beside in zip(seen[0], seen[1], strict=False):
        assert torch.equal(alone, beside)


def test_negative_prompts(model, prompts):
    options = {"seed": 1, "guidance_scale": 4.0, "temperature": 0.0}
    empty = encode(model, [""])
    default = model.generate_indices(*prompts, **options)
    assert torch.equal(model.generate_indices(*prompts, *empty, **options), default)
    assert torch.equal(
        model.generate_indices(*prompts, *(x.expand(2, -1) for x in empty), **options), default
    )
    other = model.generate_indices(*prompts, *encode(model, ["blurry, ugly"]), **options)
    assert not torch.equal(other, default)
    with pytest.raises(UserError, match="give 1 or 2 negative prompts, got 3"):
        model.generate_indices(*prompts, *(x.expand(3, -1) for x in empty))
    with pytest.raises(UserError, match="needs negative_attention_mask"):
        model.generate_indices(*prompts, empty[0])


def test_no_prompts_and_no_batch(model, prompts):
    with pytest.raises(UserError, match="give at least one prompt"):
        model.generate_indices(*(x[:0] for x in prompts))
    for size in (0, -1):
        with pytest.raises(UserError, match=f"batch_size must be at least 1, got {size}"):
            model.generate_indices(*prompts, batch_size=size)


def test_steps_stream_out(model, prompts):
    steps = list(model.stream_indices(*prompts, seed=0))
    assert [(list(step.rows), step.position) for step in steps] == [
        ([row], position) for row in (0, 1) for position in (0, 1, 2)
    ]
    heard = []
    codes = model.generate_indices(*prompts, seed=0, callback=heard.append)
    assert torch.equal(codes[1:], heard[-1].codes)
    assert torch.equal(codes[1:, :5], heard[-2].codes)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_given_codes(model, prompts, batch_size):
    mask = torch.rand(2, 21, generator=torch.Generator().manual_seed(1)) < 0.5
    result = model.generate_indices(*prompts, seed=0, known=KnownTokens(CODES, mask), batch_size=batch_size)
    assert torch.equal(result[mask], CODES[mask])
    result = model.generate_indices(*prompts, seed=0, known=KnownTokens(CODES[:, :5]), batch_size=batch_size)
    assert torch.equal(result[:, :5], CODES[:, :5])
    with pytest.raises(UserError, match=r"known codes must be \[2, L\]"):
        model.generate_indices(*prompts, known=KnownTokens(CODES[:1]))


@pytest.mark.parametrize("scales", [[1], [4], [2, 4]])
def test_schedules_of_one_scale_or_a_large_first_one(scales):
    model = build(scales=scales)
    ids, mask = encode(model, PROMPTS)
    count = sum(side * side for side in scales)
    sampled = [
        model.generate_indices(ids, mask, seed=0, use_cache=cached, temperature=0.0)
        for cached in (True, False)
    ]
    assert torch.equal(*sampled)
    assert sampled[0].shape == (2, count)
    loss = model(ids, mask, sampled[0]).loss
    loss.backward()
    assert torch.isfinite(loss)
    if scales[0] > 1:  # the cells of the first scale are told apart by their positions
        assert len(set(sampled[0][0, : scales[0] ** 2].tolist())) > 1


def test_half_precision(model, prompts):
    half = build().bfloat16()
    assert half.code_table.codes.dtype == torch.float32
    codes = half.generate_indices(*prompts, seed=0)
    assert codes.shape == (2, 21)


# ---------------------------------------------------------------------------------------------- on a GPU
@pytest.fixture
def on_gpu() -> TokenFlowForTextToImage:
    return build().to("cuda")


@pytest.mark.gpu
def test_the_cache_changes_no_code_on_a_gpu(on_gpu, prompts):
    prompts = tuple(x.cuda() for x in prompts)
    for options in ({"temperature": 0.0}, {"top_k": (8, 1), "top_p": (0.9, 0.0)}):
        cached, uncached = (
            on_gpu.generate_indices(*prompts, seed=[1, 2], use_cache=use_cache, **options)
            for use_cache in (True, False)
        )
        assert torch.equal(cached, uncached)


@pytest.mark.gpu
def test_a_seed_gives_its_codes_again_on_a_gpu(on_gpu, prompts):
    prompts = tuple(x.cuda() for x in prompts)
    both = on_gpu.generate_indices(*prompts, seed=[1, 2])
    assert torch.equal(on_gpu.generate_indices(*prompts, seed=[1, 2]), both)
    alone = on_gpu.generate_indices(*prompts, seed=[1, 2], batch_size=1)
    assert (alone == both).double().mean() > 0.9  # other kernels round otherwise, which may turn a near tie


@pytest.mark.gpu
def test_a_gpu_learns_what_a_cpu_does(prompts):
    losses, gradients = [], []
    for device in ("cpu", "cuda"):
        model = build().to(device).train()
        ids, mask = (x.to(device) for x in prompts)
        loss = model(ids, mask, CODES.to(device), text_loss=True).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad.cpu())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-3, rtol=2e-2)
