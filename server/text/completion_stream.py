"""POST /v1/completions with ``stream``: chunks of text from left to right, as far as it is settled."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from prime_core.sampling.settled import known_ids, settled_text
from server.engine.feed import RowChange
from server.engine.model_queue import ModelQueue
from server.http.sse import frame
from server.request import Running
from server.schemas.completions import (
    CompletionChoice,
    CompletionChunk,
    CompletionChunkWithUsage,
    CompletionRequest,
    CompletionUsage,
)
from server.schemas.text import GenerateResponse
from server.text.completions import Origin, PreparedPrompts, completion_of, echoed


async def stream_completion(
    running: Running[PreparedPrompts, GenerateResponse], body: CompletionRequest, origin: Origin
) -> AsyncIterator[bytes]:
    """Yield the frames of a stream: plain data, the only one that OpenAI's clients read.

    The texts of a choice joined are its text in an answer without ``stream``; its last chunk has a finish reason.

    Args:
        running: the request, started to be followed.
        body: of the request.
        origin: of every chunk.
    """
    with_usage = body.stream_options.include_usage
    queue, prepared = running.queue, running.prepared

    def chunk(*choices: CompletionChoice, usage: CompletionUsage | None = None) -> bytes:
        fields = {**origin._asdict(), "choices": list(choices)}
        return frame(
            CompletionChunkWithUsage(**fields, usage=usage) if with_usage else CompletionChunk(**fields)
        )

    texts = SettledTexts(queue, body, prepared)
    for index, text in enumerate(texts.sent):
        if text:
            yield chunk(CompletionChoice(index=index, text=text, finish_reason=None))
    async for changes in running.changes():
        for choice in await running.in_thread(texts.grown, changes.rows):
            yield chunk(choice)
    completion = completion_of(origin, queue, body, prepared, await running.answer())
    for choice in completion.choices:
        assert choice.text.startswith(texts.sent[choice.index]), "settled text is never taken back"
        rest = choice.text[len(texts.sent[choice.index]) :]
        yield chunk(choice.model_copy(update={"text": rest}))
    if with_usage:
        yield chunk(usage=completion.usage)


class SettledTexts:
    """What has been sent of each choice.

    Attributes:
        sent: the text of each choice so far; at the start the prompt, if it is to be echoed.
    """

    def __init__(self, queue: ModelQueue, body: CompletionRequest, prepared: PreparedPrompts) -> None:
        """Begin with nothing generated."""
        self._codec = queue.checkpoint.codec
        self._tokenizer = queue.checkpoint.tokenizer
        self._stops = body.stops
        self._prompts = [prepared.of_output(index) for index in range(body.num_outputs)]
        self._echoed = [echoed(queue, body, prompt) for prompt in self._prompts]
        self._num_known = [0] * body.num_outputs
        self.sent = list(self._echoed)

    def grown(self, rows: Sequence[RowChange]) -> list[CompletionChoice]:
        """Return what is new in the choices whose settled text has grown."""
        choices = []
        for row in rows:
            text = self._text_of(row)
            new = text[len(self.sent[row.output]) :]
            if new:
                self.sent[row.output] = text
                choices.append(CompletionChoice(index=row.output, text=new, finish_reason=None))
        return choices

    def _text_of(self, row: RowChange) -> str:
        canvas = self._prompts[row.output].canvas
        gap = next(segment for segment in canvas.segments if segment.gap)
        ids = known_ids(self._codec, row.y[gap.start : gap.stop])
        if len(ids) == self._num_known[row.output]:
            return self.sent[row.output]
        self._num_known[row.output] = len(ids)
        assert self._tokenizer is not None, "checked at the start"
        return self._echoed[row.output] + settled_text(canvas, ids, self._tokenizer, self._stops)
