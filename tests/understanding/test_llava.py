"""What transformers' LLaVA must do with our tower: batches, several images, strategies, dtypes, saving."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    pipeline,
)

from small_model import small_language_model, small_words
from tokenflow import TokenFlowImageProcessor, TokenFlowModel
from tokenflow.errors import UserError
from tokenflow.understanding import (
    ask,
    assemble,
    assemble_continuous,
    chat_template,
    load,
    make_processor,
)

GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


def user(text: str, images: int = 1) -> list[dict]:
    content = [{"type": "image"}] * images + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def prepare(processor, questions: list[list[dict]], pictures: list, **options):
    texts = [processor.apply_chat_template(turns, add_generation_prompt=True) for turns in questions]
    return processor(text=texts, images=pictures, return_tensors="pt", **options)


@torch.no_grad()
def test_rows_of_a_left_padded_batch_answer_as_they_do_alone(make_chat, pictures):
    model, processor = make_chat()
    questions = [user("What is it?"), user("Which colours do these two have?", images=2)]
    batch = prepare(processor, questions, pictures, padding=True)
    assert batch["attention_mask"][0, 0] == 0
    together = model.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
    for row, shown in ((0, pictures[:1]), (1, pictures[1:])):
        alone = prepare(processor, [questions[row]], shown)
        single = model.generate(**alone, **GREEDY)[0, alone["input_ids"].shape[1] :]
        assert together[row].tolist() == single.tolist()


@torch.no_grad()
def test_the_cache_changes_nothing(make_chat, pictures):
    model, processor = make_chat()
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    cached = model.generate(**inputs, **GREEDY)
    assert torch.equal(cached, model.generate(**inputs, **GREEDY, use_cache=False))


@pytest.mark.parametrize(
    ("strategy", "count", "width"),
    [
        ("last", 16, 40),
        ("last-semantic", 16, 32),
        ("last-pixel", 16, 8),
        ("all", 21, 40),
        ("all-residual", 21, 40),
    ],
)
@torch.no_grad()
def test_input_strategies_by_configuration(strategy, count, width, make_chat, pictures, tmp_path):
    model, processor = make_chat(feature_strategy=strategy)
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == count
    assert model.config.image_seq_length == count
    assert model.model.multi_modal_projector.linear_1.in_features == width
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, words = load(tmp_path, device="cpu")
    assert again.config.vision_config.feature_strategy == strategy
    torch.testing.assert_close(again(**prepare(words, [user("What is it?")], pictures[:1])).logits, expected)


@pytest.mark.parametrize("kind", ["clip_vision_model", "siglip_vision_model"])
@torch.no_grad()
def test_a_continuous_teacher_takes_the_towers_place(kind, pictures, tmp_path):
    """Tab. 9: the class token that CLIP has, and SigLIP has not, is dropped."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = AutoModel.from_config(AutoConfig.for_model(kind, image_size=32, patch_size=8, **sizes))
    images = TokenFlowImageProcessor(size=32, resize_mode="pad", image_mean=[0.4] * 3, image_std=[0.3] * 3)
    model, processor = assemble_continuous(
        vision, images, small_language_model(), small_words(), template="smollm2"
    )
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == model.config.image_seq_length == 16
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, words = load(tmp_path, device="cpu")
    torch.testing.assert_close(again(**prepare(words, [user("What is it?")], pictures[:1])).logits, expected)
    assert isinstance(ask(again, words, pictures[0], "What is it?", max_new_tokens=3), str)


def other_language_model(kind: str, **changes):
    """A random one of another layout than Llama's."""
    sizes = {"vocab_size": 320, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **changes)).eval()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", r"^GPT2LMHeadModel has a head tied to a table of another name than embed_tokens, which .*"),
        ("opt", "tied"),
        ("bloom", "tied"),
        ("phi", r"^PhiForCausalLM has a head with a bias"),
    ],
)
def test_language_models_that_llava_cannot_hold_are_refused(kind, reason, small_model_folder):
    tower = TokenFlowModel.from_pretrained(small_model_folder)
    with pytest.raises(UserError, match=reason) as caught:
        assemble(
            tower,
            other_language_model(kind),
            small_words(),
            template="smollm2",
            feature_strategy="last-semantic",
        )
    assert "\n" not in str(caught.value)
    assert tower.config.feature_strategy == "last"


@pytest.mark.parametrize(("kind", "tied"), [("gpt2", False), ("gpt_neox", False), ("olmo2", True)])
def test_language_models_of_other_layouts_answer_learn_and_are_saved(
    kind, tied, small_model_folder, pictures, tmp_path
):
    tower = TokenFlowModel.from_pretrained(small_model_folder)
    text = other_language_model(kind, tie_word_embeddings=tied)
    model, processor = assemble(tower, text, small_words(), template="smollm2")
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, _ = load(tmp_path, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
        assert torch.equal(again.generate(**inputs, **GREEDY), model.generate(**inputs, **GREEDY))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    again(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert again.lm_head.weight.grad.abs().sum() > 0


def test_a_saved_folder_is_read_by_transformers_alone(make_chat, pictures, tmp_path):
    model, processor = make_chat()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is LlavaProcessor
    assert type(again.image_processor) is TokenFlowImageProcessor
    assert again.image_processor.resize_mode == "pad"
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.padding_side == "left"
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert type(loaded.model.vision_tower) is TokenFlowModel
    assert loaded.generation_config.suppress_tokens == list(range(320, 384))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("saved", [False, True])
def test_the_pipeline_of_transformers(make_chat, pictures, tmp_path, saved):
    model, processor = make_chat()
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = ask(model, processor, pictures[0], "What?", **options)
    if saved:
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        answer = pipeline("image-text-to-text", model=str(tmp_path), device="cpu")
    else:
        answer = pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": content}]
    found = answer(text=turns, return_full_text=False, generate_kwargs=options)
    assert found[0]["generated_text"].strip() == expected
    assert expected


@torch.no_grad()
def test_bf16_keeps_the_codes(make_chat, pictures, tmp_path):
    model, processor = make_chat()
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    expected = model.model.vision_tower.encode(inputs["pixel_values"]).indices
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for half in (loaded, model.bfloat16()):
        tower = half.model.vision_tower
        assert {p.dtype for p in tower.encoders.parameters()} == {torch.float32}
        assert torch.equal(tower.encode(inputs["pixel_values"]).indices, expected)
        assert half(**inputs).logits.dtype == torch.bfloat16
        assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 5


def test_tied_tables_stay_tied_and_the_image_token_is_never_said(make_chat, pictures):
    model, processor = make_chat(text={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.lm_head.weight) == 384
    torch.testing.assert_close(model.lm_head.weight[350], model.lm_head.weight[:320].mean(0))
    with torch.no_grad():
        model.lm_head.weight[processor.image_token_id] = 100.0  # by far the likeliest, if it were allowed
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    said = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    assert int(said.max()) < 320


def test_a_table_with_room_does_not_grow(make_chat):
    model, processor = make_chat(text={"vocab_size": 336})
    assert model.config.text_config.vocab_size == 336
    assert model.generation_config.suppress_tokens == [processor.image_token_id] == [320]


def test_only_the_projector_and_the_language_model_learn(make_chat, pictures):
    model, processor = make_chat()
    inputs = prepare(processor, [user("What is it?")], pictures[:1])
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    learning = {name.split(".")[1] for name, value in model.named_parameters() if value.grad is not None}
    assert learning == {"multi_modal_projector", "language_model", "weight"}


def test_the_callers_tokenizer_is_left_alone(small_model_folder):
    words = small_words()
    config = TokenFlowModel.from_pretrained(small_model_folder).config
    processor = make_processor(words, config, template="plain")
    assert processor.image_token_id == 320 == len(words)
    with pytest.raises(UserError, match="unknown chat template 'qwen'; did you mean 'qwen_2_5'"):
        chat_template("qwen")


def test_answers_are_marked_for_training(make_chat):
    _, processor = make_chat()
    turns = [*user("What is it?"), {"role": "assistant", "content": "A boat."}]
    found = processor.tokenizer.apply_chat_template(
        turns, chat_template=processor.chat_template, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [i for i, mask in zip(found["input_ids"], found["assistant_masks"], strict=True) if mask]
    assert processor.decode(marked) == "A boat.<|im_end|>"


def test_weights_that_are_missing_are_an_error(make_chat, tmp_path):
    model, processor = make_chat()
    kept = {key: value for key, value in model.state_dict().items() if "multi_modal_projector" not in key}
    model.save_pretrained(tmp_path, state_dict=kept)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"do not fit its config\.json: 4 missing, first model\.multi_modal"):
        load(tmp_path)


def test_models_that_answer_no_questions_are_refused(small_model_folder):
    with pytest.raises(UserError, match="answers no questions: its config says 'tokenflow', not 'llava'"):
        load(small_model_folder)
    with pytest.raises(UserError, match="no model folder at /no/chat"):
        load("/no/chat")


def test_damaged_folders_are_one_line(make_chat, tmp_path):
    def refused(message: str, device: str = "cpu") -> None:
        with pytest.raises(UserError, match=message) as caught:
            load(tmp_path, device=device)
        assert "\n" not in str(caught.value)

    refused("cannot load model")  # an empty folder
    model, processor = make_chat()
    model.save_pretrained(tmp_path)
    refused("cannot load model")  # no processor
    processor.save_pretrained(tmp_path)
    refused("cannot use device 'tpu9'", device="tpu9")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused("cannot load model")
