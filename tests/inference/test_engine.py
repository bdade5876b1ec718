"""The engine on a tiny run with random weights: what it says is noise, always the same."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support import write_run

from htfa_jax import Completion, Decoding, HTFAInference
from htfa_jax.data.records import Turn
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import CheckpointError, ConfigError, DataError
from htfa_jax.inference.chat import common_prefix
from htfa_jax.inference.sampler import Sampler, settled

LONG = Decoding(max_new_tokens=24)


@pytest.fixture(scope="module")
def engine(run_folder):
    return HTFAInference.from_pretrained(run_folder)


@pytest.fixture(scope="module")
def records(dataset):
    return RecordFile(dataset)


def pair(record):
    return str(record.image_orig), str(record.image_recon)


@pytest.mark.slow
def test_a_batch_says_what_single_calls_say(engine, records):
    """In order, with questions of different lengths, drawn words too; a bad pair ends nothing."""
    pairs = [pair(records[i]) for i in range(5)]
    pairs.insert(2, ("missing.png", None))
    queries = [
        None,
        "What color is it?",
        "x",
        "How much of it is hidden, and by what? " * 3,
        "?",
        "y",
    ]
    options = Decoding(max_new_tokens=24, temperature=1.2, top_k=30, seed=3)
    together = engine.batch_infer(pairs, queries, batch_size=4, decoding=options)
    assert (
        "pair 2" in together[2].error and "image_orig: no file at missing.png" in together[2].error
    )
    for i in (0, 1, 3, 4, 5):
        alone = engine.infer(*pairs[i], queries[i], decoding=options)
        assert together[i].answer == alone.answer and together[i].error is None
        assert together[i].confidence == pytest.approx(alone.confidence, rel=1e-3)
        a, b = (np.asarray(r.completed, np.int32) for r in (together[i], alone))
        assert np.abs(a - b).max() <= 1  # rounded from values that differ by rounding
    assert together[0].query == engine.config.data.default_query
    assert len({r.answer for r in together if not r.error}) > 2


@pytest.mark.slow
def test_several_questions_give_several_results(engine, records):
    asked = ["What color is it?", "How much is hidden?"]
    several = engine.infer(*pair(records[0]), asked)
    assert [r.query for r in several] == asked
    assert several[1].answer == engine.infer(*pair(records[0]), asked[1]).answer
    mixed = engine.batch_infer([pair(records[1]), pair(records[0])], [None, asked])
    assert mixed[0].answer == engine.infer(*pair(records[1])).answer
    assert [r.answer for r in mixed[1]] == [r.answer for r in several]


@pytest.mark.slow
def test_a_bad_question_spoils_only_its_own_pair(engine, records):
    pairs = [pair(records[i]) for i in range(3)]
    results = engine.batch_infer(pairs, ["x", " ", "y"])
    assert results[0].error is None and "query" in results[1].error
    assert results[2].answer == engine.infer(*pairs[2], "y").answer


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_stream_is_the_answer_in_pieces(engine, records, temperature):
    options = dataclasses.replace(LONG, temperature=temperature)
    pieces = list(engine.stream(*pair(records[0]), "What color is it?", decoding=options))
    answer = engine.infer(*pair(records[0]), "What color is it?", decoding=options).answer
    assert "".join(pieces) == answer and len(pieces) > 2
    assert all(pieces) and not pieces[-1].endswith("\N{REPLACEMENT CHARACTER}")


def test_a_stop_sequence_ends_the_answer_wherever_tokens_begin(engine, records):
    # Random words are random bytes: it begins between two whole characters.
    broken = "\N{REPLACEMENT CHARACTER}"
    query, whole, start = next(
        (query, whole, i)
        for query in "abcdefghijklmnop"
        for whole in [engine.infer(*pair(records[0]), query, decoding=LONG).answer]
        for i in range(2, len(whole) - 4)
        if broken not in whole[i - 1 : i + 1] and whole.index(whole[i : i + 4]) == i
    )
    stop = whole[start : start + 4]
    options = dataclasses.replace(LONG, stop=("never said", stop))
    expected = whole[:start].strip()
    assert expected and len(stop) == 4
    result = engine.infer(*pair(records[0]), query, decoding=options)
    assert result.answer == expected and result.confidence > 0
    assert "".join(engine.stream(*pair(records[0]), query, decoding=options)) == expected


def test_no_blank_stays_before_half_a_character(engine, records, monkeypatch):
    monkeypatch.setattr(Sampler, "_text", lambda self, ids: "red \N{REPLACEMENT CHARACTER}")
    assert engine.infer(*pair(records[0]), "What?", decoding=LONG).answer == "red"


def test_what_is_settled():
    assert settled("one tw", ("two", "wz")) == "one"
    assert settled("one t", ("two",)) == "one"
    assert settled("one", ("two",)) == "one"
    assert settled("caf\N{REPLACEMENT CHARACTER}", ()) == "caf"
    assert settled("one ", ()) == "one"


@pytest.mark.slow
def test_a_chat_answers_like_a_fresh_prompt_of_all_turns(engine, records):
    encoded = []
    encode = engine._encode_images
    engine._encode_images = lambda *args: encoded.append(1) or encode(*args)
    chat = engine.chat(*pair(records[0]))
    prefix = chat._cache
    turns = []
    for question in ("What color is it?", "And how much of it is hidden?", "Sure?"):
        turns.append(Turn("user", question))
        prompt = engine.tokenizer.encode_prompt(turns)
        fresh = engine.sampler.answers(engine.params, prefix, [prompt], LONG)[0]
        kept = common_prefix(prompt[:-1], chat._read)
        assert chat.ask(question, decoding=LONG) == fresh.text
        turns.append(Turn("assistant", fresh.text))
        if len(turns) > 2:
            assert kept > 10  # earlier turns were not read again
    # The cache holds what it is said to hold, to the last word.
    prompt = np.append(chat._read, 5).astype(np.int32)
    fresh_cache = engine.sampler.start(engine.params, prefix, [prompt], LONG).cache
    filled = engine.sampler.num_image_tokens + len(chat._read)
    for ours, theirs in zip(chat._cache, fresh_cache, strict=True):
        np.testing.assert_allclose(ours.k[:, :, :filled], theirs.k[:, :, :filled], atol=1e-3)
    engine._encode_images = encode
    assert len(encoded) == 1 and chat.turns == turns
    assert (
        engine.infer(*pair(records[0]), "What color is it?", decoding=LONG).answer == turns[1].text
    )


def test_a_chat_that_nobody_listened_to_goes_on(engine, records):
    chat = engine.chat(*pair(records[0]))
    next(chat.stream("x", decoding=LONG))
    expected = engine.infer(*pair(records[0]), "What color is it?", decoding=LONG).answer
    assert chat.ask("What color is it?", decoding=LONG) == expected


def test_without_a_reconstruction_it_uses_its_own_completion(engine, records):
    original = str(records[0].image_orig)
    alone = engine.infer(original, return_intermediates=True)
    assert (alone.alignment, alone.recon_source) == ("own completion",) * 2
    # What it painted from the original alone, given with boxes that move nothing.
    painted = np.round(255 * alone.intermediates.reconstruction_HWC).astype(np.uint8)
    assert painted.std() > 1 and not np.array_equal(painted, Image.open(original))
    box = (0, 0, 48, 48)
    # By the same program: without intermediates there is another, which may round otherwise.
    again = engine.infer(
        original, painted, bbox_orig=box, bbox_recon=box, return_intermediates=True
    )
    assert again.answer == alone.answer and again.recon_source == "given"
    np.testing.assert_array_equal(again.completed, alone.completed)


@pytest.mark.slow
def test_how_it_was_aligned(engine, records):
    r = records[0]
    assert (
        engine.infer(*pair(r), bbox_orig=r.bbox_orig, bbox_recon=r.bbox_recon).alignment == "boxes"
    )
    assert engine.infer(*pair(r)).alignment == "identity: no box"


def test_a_completed_image_comes_in_its_own_frame(engine, records):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)
    mask = np.zeros((40, 90), bool)
    mask[5:30, 20:60] = True
    recon = str(records[0].image_recon)
    whole = np.asarray(engine.infer(image, recon).completed)
    assert whole.shape == image.shape
    options = Completion(paste_back=True)
    pasted = np.asarray(
        engine.infer(image, recon, completion=options, occluder_mask=mask).completed
    )
    np.testing.assert_array_equal(pasted[~mask], image[~mask])
    np.testing.assert_array_equal(pasted[mask], whole[mask])
    assert (pasted != image).any()
    with pytest.raises(DataError, match="occluder_mask"):
        engine.infer(image, recon, completion=options)


def test_samples_differ_by_their_seeds(engine, records):
    options = {"num_samples": 3, "temperature": 2.0}
    a, b = (engine.complete(*pair(records[0]), seed=seed, **options) for seed in (0, 1))
    assert not np.array_equal(a[0], a[1])
    np.testing.assert_array_equal(a[1], b[0])
    best = engine.complete(*pair(records[0]))[0]
    np.testing.assert_array_equal(best, engine.infer(*pair(records[0])).completed)
    changed = [
        np.any(
            np.asarray(engine.complete(*pair(r), refinement_steps=6)[0])
            != engine.complete(*pair(r))[0]
        )
        for r in (records[i] for i in range(7))
    ]
    assert any(changed)


@pytest.mark.slow
def test_intermediates_are_there(engine, records):
    seen = engine.infer(*pair(records[0]), return_intermediates=True).intermediates
    assert seen.alpha_HW.shape == (48, 48) and seen.fused_HWC.shape == (48, 48, 3)
    shown = np.asarray(Image.open(records[0].image_orig)) / 255
    np.testing.assert_allclose(seen.original_HWC, shown, atol=1e-6)
    blend = seen.alpha_HW[..., None] * seen.original_HWC
    blend += (1 - seen.alpha_HW[..., None]) * seen.aligned_HWC
    np.testing.assert_allclose(seen.fused_HWC, blend, atol=1e-4)
    np.testing.assert_allclose(seen.attention_NTS.sum(axis=-1), 1, rtol=1e-4)
    np.testing.assert_allclose(seen.code_probabilities_MC.sum(axis=-1), 1, rtol=1e-4)
    assert seen.code_probabilities_MC.shape == (36, 22)


def test_paths_images_and_arrays_are_the_same(engine, records):
    orig, recon = pair(records[0])
    expected = engine.infer(orig, recon)
    for convert in (Image.open, lambda p: np.asarray(Image.open(p))):
        result = engine.infer(convert(orig), convert(recon))
        assert result.answer == expected.answer
        np.testing.assert_array_equal(result.completed, expected.completed)
    deep = Image.fromarray(np.asarray(Image.open(orig))[..., 0].astype(np.uint16) * 256 + 37)
    grey = np.asarray(Image.open(orig))[..., 0]
    np.testing.assert_array_equal(
        engine.infer(deep, recon).completed, engine.infer(grey, recon).completed
    )


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((np.zeros((4, 4, 3)),), "image_orig: .* float64"),
        ((None,), "image_orig is missing"),
        ((7,), "image_orig must be a path"),
        ((np.zeros((9, 9, 3), np.uint8), "gone.png"), "image_recon: no file at gone.png"),
    ],
)
def test_bad_input_is_named(engine, inputs, message):
    with pytest.raises(DataError, match=message):
        engine.infer(*inputs)
    image = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(DataError, match="did you mean object_mask"):
        engine.infer(image, object_masks=image)
    with pytest.raises(DataError, match="bbox_orig must be"):
        engine.infer(image, bbox_orig=(1, 2))


@pytest.mark.slow
def test_runs_that_lack_a_part(dataset, records, tmp_path):
    mute = HTFAInference(write_run(tmp_path / "mute", dataset, loss__text_weight=0.0))
    result = mute.infer(*pair(records[0]))
    assert result.answer == "" and result.confidence is None and result.completed is not None
    with pytest.raises(ConfigError, match="text_weight"):
        mute.chat(*pair(records[0]))
    blind = HTFAInference(write_run(tmp_path / "blind", dataset, vq__has_decoder=False))
    result = blind.infer(str(records[0].image_orig))
    assert result.completed is None and result.confidence
    assert (result.recon_source, result.alignment) == ("none", "identity: no reconstruction")
    with pytest.raises(ConfigError, match="has_decoder"):
        blind.complete(*pair(records[0]))


@pytest.mark.slow
def test_too_long_a_conversation_is_refused(dataset, records, tmp_path):
    limited = write_run(tmp_path / "run", dataset, decoder__max_positions=140)
    engine = HTFAInference(limited)
    with pytest.raises(DataError, match="decoder.max_positions=140"):
        engine.infer(*pair(records[0]), decoding=Decoding(max_new_tokens=100))
    assert engine.infer(*pair(records[0])).error is None


@pytest.mark.slow
def test_another_type_and_device(run_folder, records):
    half = HTFAInference(run_folder, dtype="bfloat16", device="cpu")
    assert half.params["decoder.head.kernel"].dtype == "bfloat16"
    assert half.infer(*pair(records[0])).confidence > 0
    assert HTFAInference(run_folder, "cpu").step == half.step  # as the original takes it
    with pytest.raises(CheckpointError, match="not a run"):
        HTFAInference(run_folder / "nothing")
    with pytest.raises(ConfigError, match="device=tpu: this machine has no such device"):
        HTFAInference(run_folder, device="tpu")


@pytest.mark.slow
def test_int8_weights_are_close_to_their_own(run_folder, engine, records):
    """Rounded to the nearest of 255 steps per row; the embedding and other parts as they are."""
    small = HTFAInference(run_folder, quantize="int8")
    for path, own in engine.params.items():
        kept = small.params[path]
        if path.startswith("decoder.") and path.endswith(".kernel"):
            assert kept.qvalue.dtype == np.int8
            step = np.abs(own).max(axis=1, keepdims=True) / 127
            close = np.asarray(kept.qvalue) * np.asarray(kept.scale) - own
            assert np.all(np.abs(close) <= 0.51 * step), path
        else:
            np.testing.assert_array_equal(kept, own)
    a, b = (e.infer(*pair(records[0]), decoding=LONG).confidence for e in (small, engine))
    assert a != b and a == pytest.approx(b, rel=0.3)


def test_int8_without_its_package_says_what_to_install(run_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ConfigError, match="pip install 'htfa-jax.int8.'"):
        HTFAInference(run_folder, quantize="int8")


@pytest.mark.slow
def test_it_starts_without_transformers_and_torch():
    """Importing transformers alone takes seconds."""
    program = (
        "import sys; import htfa_jax.infer; from htfa_jax import HTFAInference;"
        "print([m for m in ('transformers', 'torch', 'grain', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_names_of_the_original_s_arguments_work(engine, records, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "_encode_pair", lambda *args: seen.append(args[:2]))
    monkeypatch.setattr(engine, "_results", lambda *args: [args[1]])
    orig, recon = pair(records[0])
    assert engine.infer(img_orig=orig, img_recon=recon, query="Q?") == ["Q?"]
    assert engine.infer(orig, recon, "Q?") == ["Q?"]
    assert seen == [(orig, recon)] * 2
    monkeypatch.setattr(engine, "iterate", lambda pairs, queries, **options: [pairs, queries])
    assert engine.batch_infer(image_pairs=[1], queries=["Q?"], batch_size=2) == [[1], ["Q?"]]
    with pytest.raises(TypeError, match="under two names"):
        engine.infer(img_orig=orig, image_orig=orig)
