"""How the page is arranged, and which of its parts moves which."""

from __future__ import annotations

import functools
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from htfa_jax.checkpoints.runs import DEMO, EXAMPLES
from htfa_jax.data.records import Record
from htfa_jax.demo import show
from htfa_jax.demo.events import Events, close
from htfa_jax.demo.files import Files
from htfa_jax.demo.page import COVER, MARKS, Actions, board, upload
from htfa_jax.demo.serving import Serving
from htfa_jax.demo.sessions import IDLE
from htfa_jax.inference.inputs import read_jobs

THEME = gr.themes.Soft(
    primary_hue="teal",
    secondary_hue="teal",
    neutral_hue="slate",
    # Those of the machine: others would be loaded.
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
).set(
    # Text that can be read: a contrast of 4.5 everywhere.
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_300",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    block_label_background_fill="*neutral_100",
    block_label_background_fill_dark="*neutral_700",
    block_label_text_color="*neutral_700",
    block_label_text_color_dark="*neutral_100",
    block_label_text_size="*text_sm",
    block_title_background_fill="transparent",
    block_title_background_fill_dark="transparent",
    block_title_padding="0",
    block_title_text_color="*neutral_700",
    block_title_text_color_dark="*neutral_100",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_secondary_background_fill_hover_dark="*neutral_600",
    checkbox_label_background_fill_selected="*primary_700",
    checkbox_label_background_fill_selected_dark="*primary_700",
    slider_color="*primary_600",
)
QUESTIONS = (
    "What's the object in the hand?",
    "What color is the object in the hand?",
    "How much of the object is hidden by the hand?",
)
TITLE = "What is in the hand?"
# No endpoint of Gradio's own API.
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
EMPTY = "The completed image appears here."
INSIDE = "Run the model on an image: figures of what it saw appear here."


def examples() -> list[Record]:
    """The scenes that the package brings."""
    return [job.record for job in read_jobs(DEMO / EXAMPLES, ())]


def css() -> str:
    """The page's style."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    return style + show.thumbnails(examples())


def build_page(serving: Serving, model: str, files: Files) -> gr.Blocks:
    """The page.

    Args:
      serving: the engine behind its queue.
      model: what the model is called.
      files: what visitors sent.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=None) as page:
        Page(Actions(serving, files, model))
    # Requests wait in our own queue.
    page.queue(max_size=None, default_concurrency_limit=None, api_open=False)
    return page


class Page(Events):
    """The components, arranged, and the events between them."""

    def __init__(self, actions: Actions):
        self.actions = actions
        self.examples = examples()
        self.session = gr.State(None, time_to_live=IDLE, delete_callback=close)
        gr.HTML(_header(actions.model, actions.serving.engine.step))
        with gr.Row(elem_id="board"):
            with gr.Column(min_width=320, elem_classes="card"):
                self._images()
            with gr.Column(min_width=320, elem_classes="card"):
                self._results()
            with gr.Column(min_width=320, elem_classes="card"):
                self._talk()
        with gr.Column(elem_classes="card"):
            self._insights()
        # What a run of the model depends on, and what it changes.
        self.sent = [
            self.orig, self.recon, *self.boxes, self.marks, self.drawing, self.known_mask,
            *self.completion,
        ]  # fmt: skip
        self.seen = [
            self.compare, self.facts, self.image, self.make_report, self.asker, self.asking,
            self.chat, self.attention, self.inside,
        ]  # fmt: skip
        self._connect()

    def _images(self) -> None:
        gr.HTML("<h2>1 · Images</h2>")
        image = {"height": 210, "buttons": [], "sources": ["upload"]}
        with gr.Row():
            self.orig = upload(label="Original", alt_text="the original", elem_id="orig", **image)
            self.recon = upload(
                label="Reconstruction",
                alt_text="the reconstruction",
                elem_id="recon",
                **image,
            )
        with gr.Row(elem_id="examples"):
            self.choices = [
                gr.Button(
                    record.id.replace("_", " "), size="sm", min_width=64, elem_id=f"example-{i}"
                )
                for i, record in enumerate(self.examples)
            ]
        with gr.Accordion("Where the object is (optional)", open=False):
            self.boxes = [
                gr.Textbox(label=f"Box in the {name}: x, y, width, height", max_lines=1)
                for name in ("original", "reconstruction")
            ]
            self.marks = gr.Radio(list(MARKS), value=COVER, label="Drawn below is")
            self.drawing = board(label="Mask", height=320, elem_id="drawing")
        # Of an example, until something is drawn: its own mask of what covers it.
        self.known_mask = gr.State(None)
        with gr.Accordion("Completion parameters", open=False):
            self.completion = [
                gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)"),
                gr.Slider(1, 8, 1, step=1, label="Refinement steps"),
                gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
                gr.Checkbox(label="Replace only what covers it (needs such a mask)"),
            ]
        self.run = gr.Button("Run", variant="primary", elem_id="run")

    def _results(self) -> None:
        gr.HTML("<h2>2 · The whole object</h2>")
        self.compare = gr.HTML(show.placeholder(EMPTY), elem_id="compare")
        self.facts = gr.HTML(elem_id="facts")
        with gr.Row():
            self.image = gr.DownloadButton("Download image", size="sm", interactive=False)
            self.make_report = gr.Button("Download report", size="sm", interactive=False)
        # Filled by the button above, then pressed by the page itself.
        self.report = gr.DownloadButton("report", elem_id="report", visible="hidden")

    def _talk(self) -> None:
        gr.HTML("<h2>3 · Questions</h2>")
        self.chat = gr.Chatbot(
            show_label=False,
            label="Conversation",
            height=330,
            buttons=[],
            layout="bubble",
            elem_id="chat",
            placeholder="Ask about the object.",
        )
        with gr.Row(elem_id="suggestions"):
            self.suggestions = [gr.Button(text, size="sm", min_width=64) for text in QUESTIONS]
        with gr.Row(elem_id="asking"):
            self.question = gr.Textbox(
                label="Question",
                show_label=False,
                placeholder="Your question",
                max_lines=1,
                max_length=self.actions.serving.limits.question,
                scale=4,
                elem_id="question",
            )
            self.ask = gr.Button("Ask", variant="primary", scale=1, min_width=72, elem_id="ask")
        with gr.Accordion("Decoding parameters", open=False):
            most = self.actions.serving.limits.max_new_tokens
            default = self.actions.serving.engine.config.eval.max_new_tokens
            self.decoding = [
                gr.Slider(1, most, min(default, most), step=1, label="Max new tokens"),
                gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)"),
                gr.Slider(0, 100, 0, step=1, label="Top k (0: all tokens)"),
                gr.Slider(0.05, 1, 1, step=0.05, label="Top p"),
                gr.Slider(0.5, 2, 1, step=0.05, label="Repetition penalty"),
                gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**32 - 1),
            ]

    def _insights(self) -> None:
        gr.HTML("<h2>4 · Inside</h2>")
        with gr.Tabs():
            with gr.Tab("Attention"), gr.Row():
                with gr.Column(scale=1, min_width=240, visible=False) as self.asker:
                    self.asking = gr.Image(
                        label="Click a place: what does it attend to?",
                        alt_text="the original; a click chooses a place",
                        interactive=False,
                        buttons=[],
                        height=260,
                        type="filepath",
                        elem_id="place-image",
                    )
                    with gr.Group(elem_id="place"):
                        self.place = [
                            gr.Slider(0, 100, 50, step=1, label=f"{name} (percent)")
                            for name in ("Across", "Down")
                        ]
                with gr.Column(scale=3, min_width=320):
                    self.attention = gr.HTML(show.placeholder(INSIDE), elem_id="attention")
            with gr.Tab("Maps"):
                self.inside = gr.HTML(show.placeholder(INSIDE), elem_id="inside")

    def _connect(self) -> None:
        quiet, session = {"show_progress": "hidden", **PRIVATE}, self.session
        sent, seen = [session, *self.sent], [session, *self.seen]
        figures = [session, self.attention, self.inside]
        running = {"show_progress_on": self.compare, **PRIVATE}
        self.run.click(self.on_run, sent, seen, **running).success(
            self.on_drawing, session, figures, **PRIVATE
        )
        for choice, record in zip(self.choices, self.examples, strict=True):
            values = functools.partial(example_values, record)
            choice.click(values, None, self.sent[:7], **quiet).success(
                self.on_run, sent, seen, **running
            ).success(self.on_drawing, session, figures, **PRIVATE)
        # A new image has other boxes and another mask.
        belongs = [*self.boxes, self.drawing, self.known_mask]
        self.orig.upload(lambda path: ["", "", canvas(path), None], self.orig, belongs, **quiet)
        self.orig.clear(lambda: ["", "", None, None], None, belongs, **quiet)

        for event, question in (
            (self.ask.click, self.question),
            (self.question.submit, self.question),
            *((button.click, button) for button in self.suggestions),
        ):
            event(
                self.on_question,
                [session, question, *self.sent, *self.decoding],
                [session, self.question, *self.seen],
                **quiet,
            ).success(self.on_drawing, session, figures, **quiet)
        self.chat.clear(self.on_clear, session, session, **quiet)

        for slider in self.place:
            slider.input(
                self.on_place,
                [session, *self.place],
                [session, self.attention],
                trigger_mode="always_last",
                **quiet,
            )
        self.asking.select(self.on_click, session, [session, self.attention, *self.place], **quiet)
        self.make_report.click(self.on_report, session, [session, self.report], **PRIVATE).success(
            None, js="() => document.querySelector('#report').click()"
        )


def example_values(record: Record) -> list[Any]:
    """What an example puts into the page's inputs."""
    boxes = [", ".join(f"{v:g}" for v in box) for box in (record.bbox_orig, record.bbox_recon)]
    return [
        str(record.image_orig), str(record.image_recon), *boxes, COVER,
        canvas(str(record.image_orig)), str(record.occluder_mask),
    ]  # fmt: skip


def canvas(path: str) -> dict[str, Any]:
    """An image to draw on."""
    return {"background": path, "layers": [], "composite": None}


def _header(model: str, step: int) -> str:
    return (
        f"<header><h1>{TITLE}</h1><p>The model looks at a photograph of an object that something "
        "hides, and at a reconstruction of the object if there is one; it completes the "
        "image of the whole object and answers questions about it. "
        f"This is <b>{escape(model)}</b>, step {step:,}.</p></header>"
    )
