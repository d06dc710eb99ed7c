"""Answers to many questions about many pictures, in batches.

1. The questions are cut into windows, those about one picture together.
2. Threads read the pictures of the next window while the model works on this one; each picture is encoded once.
3. The questions of a window, equal ones once, are sorted by length and answered in batches; padding changes no answer.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from visualrwkv.errors import InputError, one_line
from visualrwkv.prompt import build_prompt

WINDOW = 4  # batches answered between two looks at the pictures; more would keep more features in memory


@dataclass
class Answer:
    """What became of one question: the text of the reply, or the reason why it could not be asked."""

    question: object
    prompt: str | None = None
    text: str | None = None
    error: str | None = None


class Answerer:
    """Answers questions in batches; the answers are those of batch size 1.

    Args:
        vlm: a `visualrwkv.VisualRWKV`.
        bench: the benchmark, which knows where pictures are.
        batch_size: questions at a time.
        max_new_tokens: longest answer.
        workers: threads that read pictures ahead.
        blank: show questions without a picture all-zero features, as VisualRWKV v6.0 was evaluated.
    """

    def __init__(self, vlm, bench, batch_size=1, max_new_tokens=128, workers=2, blank=False):
        from visualrwkv.sampling import Sampling

        self.vlm, self.bench, self.batch_size, self.workers, self.blank = vlm, bench, batch_size, workers, blank
        self.sampling = Sampling(max_new_tokens=max_new_tokens)

    def answers(self, questions):
        """Yield an `Answer` for each question, in the order in which they are known."""
        with ThreadPoolExecutor(self.workers) as pool:
            waiting = None
            for window in [*windows(questions, WINDOW * self.batch_size), None]:
                coming = None
                if window is not None:
                    first = {question.image: question for question in window if question.image is not None}
                    coming = window, {image: pool.submit(self._pixels, one) for image, one in first.items()}
                if waiting is not None:
                    yield from self._window(*waiting)
                waiting = coming

    def _pixels(self, question):
        """Pixel values (1, 3, S, S) of a question's picture, or the reason why there are none."""
        from visualrwkv.image_processing import load_image

        try:
            picture = load_image(self.bench.picture(question))
            return self.vlm.processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        except (InputError, OSError, ValueError, KeyError) as error:
            return one_line(error)

    def _window(self, window, pixels):
        pixels = {image: job.result() for image, job in pixels.items()}
        broken = {image: reason for image, reason in pixels.items() if isinstance(reason, str)}
        asked = {}  # POPE asks the same about a picture in all three categories: once is enough
        for question in window:
            if question.image in broken:
                yield Answer(question, error=broken[question.image])
            else:
                asked.setdefault((question.image, question.text), []).append(question)
        features = self._encode({image: value for image, value in pixels.items() if image not in broken})
        rows = [(twins, *self._encode_prompt(twins[0])) for twins in asked.values()]
        rows.sort(key=lambda row: len(row[1]))
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            images = [twins[0].image for twins, *_ in batch]
            texts = self._ask([ids for _, ids, _ in batch], [features[image] for image in images if image in features])
            for (twins, _, prompt), text in zip(batch, texts, strict=True):
                yield from (Answer(question, prompt, text) for question in twins)

    def _encode(self, pixels):
        """{picture: features (1, num_image_tokens, D)}; None stands for no picture."""
        import torch

        model, features = self.vlm.model, {}
        images = list(pixels)
        with torch.inference_mode():
            for start in range(0, len(images), self.batch_size):
                batch = images[start : start + self.batch_size]
                values = torch.cat([pixels[image] for image in batch]).to(model.device)
                features |= zip(batch, model.get_image_features(values).split(1), strict=True)
        if self.blank:
            width = model.config.text_config.hidden_size
            features[None] = torch.zeros(
                1, model.config.num_image_tokens, width, dtype=model.dtype, device=model.device
            )
        return features

    def _encode_prompt(self, question):
        """Ids and string of a question's prompt."""
        processor, turns = self.vlm.processor, [question.turn()]
        ids, _ = processor.encode_turns(turns, open_reply=True)
        if question.image is None and self.blank:
            ids = [processor.image_token_id] * processor.num_image_tokens + ids
        return ids, prompt_text(question, processor.prompt)

    def _ask(self, rows, features):
        import torch

        inputs = dict(self.vlm.processor.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
        if features:
            inputs["image_features"] = torch.cat(features)
        return self.vlm.answers(inputs, self.sampling)


def prompt_text(question, position):
    """The prompt of a question as a string, the picture as "<image>"."""
    return "".join(segment.text for segment in build_prompt([question.turn()], position, open_reply=True))


def windows(questions, size):
    """Lists of at least `size` questions, those about one picture together (as a list, however many they are)."""
    groups = {}
    for index, question in enumerate(questions):
        groups.setdefault(index if question.image is None else (question.image,), []).append(question)
    window = []
    for group in groups.values():
        window += group
        if len(window) >= size:
            yield window
            window = []
    if window:
        yield window
