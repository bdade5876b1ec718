"""Where the model looked, as numbers, as figures, and as a page."""

import base64
import dataclasses
import io
import json
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from htfa_jax import Decoding, HTFAInference
from htfa_jax.data.records import Turn
from htfa_jax.data.sources.json_lines import RecordFile
from htfa_jax.errors import ConfigError, DataError
from htfa_jax.evaluation.look_inside import (
    answer_figure,
    cells_at,
    cells_of,
    figures,
    images_figure,
    level2_figure,
    png,
)
from htfa_jax.evaluation.report_html import write_report
from htfa_jax.inference.answer_attention import END, AnswerAttention, rollout
from htfa_jax.inference.options import View
from htfa_jax.inference.results import Intermediates, Result
from htfa_jax.models.kv_cache import with_room

P, M, SIZE = 16, 36, 48


def one_result(tokens=("a", " b", END), **changes):
    """A result as the engine gives it, of noise."""
    rng = np.random.default_rng(0)

    def rows(*shape):
        x = rng.random(shape, np.float32)
        return x / x.sum(axis=-1, keepdims=True)

    hidden = np.zeros((SIZE, SIZE), bool)
    hidden[12:36, 0:20] = True  # rows 1 and 2 of 4; column 0 whole, of column 1 two thirds
    seen = Intermediates(
        *(rng.random((SIZE, SIZE, 3)) for _ in range(4)),
        alpha_HW=rng.random((SIZE, SIZE)),
        attention_NTS=rows(3, P, P),
        code_probabilities_MC=rows(M, 22),
        region=(0.0, 6.0, 48.0, 36.0),
        region_recon=(0.0, 0.0, 48.0, 48.0),
        box=(4.0, 8.0, 20.0, 24.0),
        box_recon=(10.0, 10.0, 24.0, 24.0),
        occluded_HW=hidden,
    )
    seen = dataclasses.replace(seen, **changes)
    attention = AnswerAttention(
        tokens, 0.8 * rows(2, 4, len(tokens), P + M), 0.5 * rows(len(tokens), P + M), P
    )
    completed = Image.fromarray(np.full((60, 80, 3), 200, np.uint8))
    return Result(
        "a b", 0.5, completed, "boxes", query="$Why$?", intermediates=seen, attention=attention
    )


def maps(figure):
    """What is drawn over the images of a figure, by title."""
    return {
        ax.get_title(): np.asarray(ax.images[1].get_array()).ravel()
        for ax in figure.axes
        if len(ax.images) == 2
    }


def test_rollout_is_the_product_of_the_whole_matrices():
    rng = np.random.default_rng(0)
    layers, B, S, T = 3, 2, 7, 5
    whole = np.tril(rng.random((layers, B, S + T, S + T), np.float32))
    whole /= whole.sum(axis=-1, keepdims=True)
    product = np.broadcast_to(np.eye(S + T), (B, S + T, S + T))
    for layer in whole:
        product = (layer + np.eye(S + T)) / 2 @ product
    rows = np.array([[4, 2], [0, 3]])
    expected = np.stack([product[b, S + rows[b], :S] for b in range(B)])
    found = rollout(jnp.array(whole[:, :, :S, :S]), jnp.array(whole[:, :, S:]), jnp.array(rows))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_the_attention_of_an_answer_is_at_the_positions_that_chose_its_tokens(run_folder, dataset):
    """Against one pass over everything that the decoder read, image tokens and words."""
    engine = HTFAInference(run_folder)
    record, options = RecordFile(dataset)[0], Decoding(max_new_tokens=6)
    pair = record.image_orig, record.image_recon
    result = engine.infer(*pair, "x", decoding=options, completion=None, return_intermediates=True)
    prompt = engine.tokenizer.encode_prompt([Turn("user", "x")])
    cache = engine.chat(*pair)._cache
    said = engine.sampler.answers(engine.params, cache, [prompt], options)[0]
    assert said.text == result.answer and said.attention is None
    text_T = np.concatenate([prompt, said.tokens])
    length = len(text_T)

    @jax.jit
    def whole(params, cache):
        decoder = engine._model.merge(params).decoder
        positions = P + M + jnp.arange(length)[None]
        inputs = decoder.embed(text_T[None])
        return decoder.with_attention(
            inputs, positions, with_room(cache, P + M + length), lambda w: w
        ).attention

    weights = np.asarray(whole(engine.params, cache))[:, 0]
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-5)
    found, last = result.attention, len(prompt) - 1
    assert len(found.words) == len(said.tokens) > 1
    expected = weights[:, :, last : length - 1, : P + M]
    np.testing.assert_allclose(found.weights, expected, atol=1e-5)
    assert np.abs(np.diff(expected, axis=2)).max() > 1e-2  # another row would be another thing
    rollout_T = found.rollout_TS.sum(axis=-1)
    assert np.all(rollout_T > 0) and np.all(rollout_T < 1)


def test_a_view_is_a_layer_a_head_their_mean_or_the_rollout():
    attention = one_result().attention
    w = attention.weights
    for view, expected in (
        (View(), w.mean(axis=(0, 1))),
        (View(layer=1), w[1].mean(axis=0)),
        (View(head=2), w[:, 2].mean(axis=0)),
        (View(layer=1, head=3), w[1, 3]),
        (View(rollout=True), attention.rollout_TS),
    ):
        np.testing.assert_allclose(attention.over_images(view), expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="head=4: the decoder has 4, 0 to 3"):
        attention.over_images(View(head=4))
    with pytest.raises(ConfigError, match="rollout"):
        View(layer=0, rollout=True)


def test_cells_of_a_mask_and_of_points():
    mask = np.zeros((12, 12), bool)
    mask[3:9, 4:7] = True  # cells of 3 x 3: of column 1 two thirds, of column 2 one third
    np.testing.assert_array_equal(cells_of(mask, 16), [5, 9])
    mask = np.zeros((12, 12), bool)
    mask[4, 10] = True
    np.testing.assert_array_equal(cells_of(mask, 16), [7])
    np.testing.assert_array_equal(cells_at([(11.9, 0), (0, 3), (11, 2)], (12, 12), 16), [3, 4])
    for points in ([], [(12, 0)], [(1, 1), (0, -0.1)]):
        with pytest.raises(DataError, match="0 <= x < 12"):
            cells_at(points, (12, 12), 16)


def test_the_occluded_part_asks_in_level_2_per_head_and_mean():
    result = one_result()
    rows_NS = result.intermediates.attention_NTS[:, [4, 5, 8, 9]].mean(axis=1)
    drawn = maps(level2_figure(result))
    assert list(drawn) == ["mean of heads", "head 0", "head 1", "head 2"]
    for i in range(3):
        np.testing.assert_allclose(drawn[f"head {i}"], rows_NS[i], rtol=1e-6)
    np.testing.assert_allclose(drawn["mean of heads"], rows_NS.mean(axis=0), rtol=1e-6)
    # Without masks it is the box's centre (14, 20), without a box the image's (24, 24).
    for changes, cell in (({}, 5), ({"box": None}, 10)):
        drawn = maps(level2_figure(one_result(occluded_HW=None, **changes)))
        np.testing.assert_allclose(
            drawn["head 1"], result.intermediates.attention_NTS[1, cell], rtol=1e-6
        )
    drawn = maps(level2_figure(result, points=[(47, 0), (13, 47)]))
    expected = result.intermediates.attention_NTS[2, [3, 13]].mean(axis=0)
    np.testing.assert_allclose(drawn["head 2"], expected, rtol=1e-6)


def test_the_tokens_of_an_answer_over_both_branches():
    result = one_result()
    over_TS = result.attention.over_images(View(layer=1))
    drawn = maps(answer_figure(result, View(layer=1)))
    assert len(drawn) == 8  # the mean and three tokens, twice
    for token, row in (
        ("“b”", over_TS[1]),
        ("(end)", over_TS[2]),
        ("mean of tokens", over_TS.mean(0)),
    ):
        for branch, part in (("understanding", row[:P]), ("generation", row[P:])):
            title = f"{token}\n{branch} {part.sum():.0%}"
            np.testing.assert_allclose(drawn[title], part, rtol=1e-6)
    long = answer_figure(one_result(tokens=tuple("abcdefghij")))
    assert len(maps(long)) == 16 and "first 7 of 10 tokens" in long._suptitle.get_text()


@pytest.mark.slow
def test_every_figure_that_there_is_something_for():
    result, truth = one_result(), np.zeros((60, 80, 3), np.uint8)
    drawn = figures(result, result, truth=truth)
    kinds = ["images", "alpha", "alignment", "level2", "codes", "answer", "answer_2"]
    assert list(drawn) == kinds
    titles = [ax.get_title() for ax in drawn["images"].axes]
    assert titles == ["original", "reconstruction", "fused", "completed", "truth"]
    # The letterbox's padding is cut off: the image has the shape of the original, 4 : 3.
    assert drawn["images"].axes[3].get_xlim() == (0, 48)
    assert drawn["images"].axes[3].get_ylim() == (42, 6)
    inside = drawn["images"].axes[3].images[0].get_array()[6:42]
    np.testing.assert_allclose(inside, 200 / 255, atol=1e-6)
    boxes = [p.get_bbox().bounds for ax in drawn["alignment"].axes for p in ax.patches]
    assert boxes == [(4, 8, 20, 24), (10, 10, 24, 24), (4, 8, 20, 24)]
    for kind, label in (
        ("alpha", "weight of the original"),
        ("level2", "attention weight"),
        ("codes", "probability of the best code"),
        ("answer", "attention (all layers, all heads)"),
    ):
        assert drawn[kind].axes[-1].get_ylabel() == label
    for figure in drawn.values():
        assert np.asarray(Image.open(io.BytesIO(png(figure))).convert("RGB")).std() > 20

    bare = one_result(code_probabilities_MC=None, box=None, box_recon=None, occluded_HW=None)
    bare = dataclasses.replace(bare, completed=None, attention=None, alignment="identity: no box")
    drawn = figures(bare)
    assert list(drawn) == ["images", "alpha", "alignment", "level2"]
    assert len(drawn["images"].axes) == 3
    assert drawn["alignment"]._suptitle.get_text() == "not moved (identity: no box)"
    with pytest.raises(DataError, match="return_intermediates"):
        images_figure(dataclasses.replace(bare, intermediates=None))
    with pytest.raises(DataError, match="no answer"):
        answer_figure(bare)


class Page(HTMLParser):
    """Tags, which must close in the order in which they opened, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_holds_all_of_a_batch_and_nothing_from_elsewhere(tmp_path):
    bad = '<script>alert("1")</script>'
    shades = {"images": 40, "answer_2": 220, "completed": 130}
    for name, shade in shades.items():
        Image.new("RGB", (32, 24), (shade,) * 3).save(tmp_path / f"{name}.png")
    said = [{"query": bad, "answer": "a & b\u2028", "confidence": 0.456},
            {"query": "Q", "answer": "", "confidence": None}]  # fmt: skip
    facts = {"answers": said, "alignment": "boxes", "reconstruction": "given"}
    entries = [
        {"id": bad, **facts, "completed": "completed.png",
         "figures": {name: f"{name}.png" for name in ("images", "answer_2")}},
        {"id": "no figures", **facts, "completed": "completed.png"},
        {"id": "deleted since", **facts, "figures": {"alpha": "gone.png"}},
        {"id": "failed", "error": f"no file at {bad}"},
    ]  # fmt: skip
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    (tmp_path / "predictions.jsonl").write_text(lines, encoding="utf-8")
    text = write_report(tmp_path, bad).read_text()
    page = Page(text)
    assert bad not in text and page.text.count(bad) == 8  # titles, id, questions, error
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe"})
    assert "a & b" in page.text and "0.46" in page.text and "4 pairs, 1 failed" in page.text
    assert "gone.png is not there any more" in page.text
    addresses = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href")]
    images = [a for a in addresses if not a.startswith("#")]
    assert len(images) == 3 and "url(" not in text and "http" not in text
    for address, shade in zip(images, shades.values(), strict=True):
        kind, data = address.split(",")
        assert kind == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert image.size == (32, 24)
            assert np.abs(np.asarray(image, int) - shade).max() <= 3
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert [a[1:] for a in addresses if a.startswith("#")] == ids


@pytest.mark.parametrize(
    "changes,field",
    [
        ({"answers": None}, "answers"),
        ({"answers": [{"query": "q"}]}, "answers"),
        ({"answers": [{"query": "q", "answer": "a", "confidence": "x"}]}, "answers"),
        ({"answers": [{"query": "q", "answer": "a", "confidence": 10**400}]}, "answers"),
        ({"figures": []}, "figures"),
        ({"figures": {"images": 3}}, "figures"),
        ({"alignment": 5}, "alignment"),
        ({"completed": 5}, "completed"),
        ({"id": None}, "id"),
        ({"error": [1]}, "error"),
    ],
    ids=str,
)
def test_a_prediction_that_is_none_is_named(tmp_path, changes, field):
    said = {"query": "q", "answer": "a", "confidence": None}
    entry = {"id": "a", "answers": [said], "alignment": "boxes", "reconstruction": "given"}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(entry) + "\n")
    write_report(tmp_path, "title")
    for gone in ("a" * 5000, "\0"):
        lines = json.dumps(entry | {"completed": gone}) + "\n"
        (tmp_path / "predictions.jsonl").write_text(lines)
        with pytest.raises(DataError, match="predictions.jsonl, id a: .{,400}$"):
            write_report(tmp_path, "title")
    (tmp_path / "predictions.jsonl").write_text(2 * (json.dumps(entry | changes) + "\n"))
    with pytest.raises(DataError, match=f"predictions.jsonl, prediction 0: {field} must be"):
        write_report(tmp_path, "title")


@pytest.mark.parametrize(
    "bad",
    [
        "<script>alert(1)</script>",
        """"><img src=x onerror="alert(1)">""",
        "' onload='alert(1)",
        "javascript:alert(1)",
        "</style></title></table><!-- ]]> {{ title }} {% raw %} &lt;b&gt;",
    ],
)
def test_what_a_prediction_says_is_text_wherever_it_stands(bad, tmp_path):
    file = bad.replace("/", "_") + ".png"  # names of files may hold all of this
    Image.new("RGB", (32, 24)).save(tmp_path / file)
    facts = {
        "answers": [{"query": bad, "answer": bad, "confidence": 0.5}],
        "alignment": bad,
        "reconstruction": bad,
    }
    entries = [
        {"id": bad, **facts, "figures": {"level2": file, "codes": f"gone {bad}"}},
        {"id": bad, **facts, "completed": file},
        {"id": bad, "error": bad},
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "predictions.jsonl").write_text(lines, encoding="utf-8")
    page = Page(write_report(tmp_path, bad).read_text(encoding="utf-8"))
    # Twice the title; the list of all; the headings; two pairs; a file that is gone; an error.
    assert page.text.count(bad) == 2 + 5 + 3 + 2 * 4 + 1 + 1
    attributes = {(tag, name) for tag, attrs in page.tags for name in attrs}
    assert attributes == {
        ("html", "lang"), ("meta", "charset"), ("meta", "name"), ("meta", "content"),
        ("div", "class"), ("span", "class"), ("p", "class"), ("th", "scope"), ("a", "href"),
        ("section", "id"), ("img", "loading"), ("img", "alt"), ("img", "src"),
    }  # fmt: skip
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "b"})
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert [a["alt"] for a in images] == [f"level2, {bad}", f"completed, {bad}"]
    assert all(a["src"].startswith("data:image/webp;base64,") for a in images)
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == [f"#pair-{i}" for i in range(len(entries))]
