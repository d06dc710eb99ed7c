"""VisualRWKV as a model of lmms-eval (extra `[lmms]`).

`lmms-eval --model visualrwkv --model_args checkpoint=FOLDER,image_position=middle --tasks gqa,pope --batch_size 8`

lmms-eval's prompts and scores are its own: they do not reproduce the numbers of papers, `visualrwkv eval` does.
"""

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from visualrwkv.errors import InputError
from visualrwkv.eval.run import own_device
from visualrwkv.loading import load
from visualrwkv.prompt import MARKER, Turn

_POSITIONS = {"middle": "sandwich", "sandwich": "sandwich", "first": "first", "last": "last"}
_SINGLE_BEAM = (None, 1)


class VisualRWKVForLmmsEval(lmms):
    """Answers lmms-eval's "simple" requests, a context and the pictures of a document, and scores given answers.

    Args:
        checkpoint: as in `visualrwkv.load`; the embedded model by default.
        image_position: "middle" (the sandwich), "first" or "last"; by default what the checkpoint says.
        batch_size: questions at a time.
        device, dtype: as in `visualrwkv.load`; under several processes a CUDA device each.
        max_new_tokens: for tasks that do not say it themselves.
        max_batch_size: accepted for lmms-eval, which always passes it, and not needed.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint=None,
        image_position=None,
        batch_size=1,
        device=None,
        dtype="auto",
        max_new_tokens=128,
        max_batch_size=None,
    ):
        super().__init__()
        if image_position is not None and image_position not in _POSITIONS:
            raise InputError(f"image_position is {image_position!r}; use one of {', '.join(_POSITIONS)}")
        self.batch_size = _number("batch_size", batch_size, int)
        self.max_new_tokens = _number("max_new_tokens", max_new_tokens, int)
        device = own_device() if device in (None, "cuda") else device
        self.vlm = load(checkpoint, device=device, dtype=dtype, prompt=_POSITIONS.get(image_position))
        self.device = self.vlm.model.device

    def generate_until(self, requests):
        """Replies in the order of the requests; those with equal settings share batches."""
        replies = [None] * len(requests)
        groups = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        with tqdm(total=len(requests), unit="question", disable=self.rank != 0) as bar:
            for places in groups.values():
                places.sort(key=lambda place: len(requests[place].args[0]))
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    texts = self._ask([requests[place].args for place in batch])
                    for place, text in zip(batch, texts, strict=True):
                        context, options = requests[place].args[:2]
                        self.cache_hook.add_partial("generate_until", (context, options), text)
                        replies[place] = text
                    bar.update(len(batch))
        return replies

    def _ask(self, batch):
        """Replies to requests (context, options, doc_to_visual, doc_id, task, split) with equal options."""
        options = batch[0][1]
        questions = [context.replace(MARKER, "") for context, *_ in batch]
        asked = [place for place, question in enumerate(questions) if question.strip()]
        pictures = []
        for place in asked:
            _, _, to_visual, id, task, split = batch[place]
            pictures.append(list(to_visual(self.task_dict[task][split][id]) or ()))
        texts = self.vlm.ask(pictures, [questions[place] for place in asked], **self._sampling(options))
        replies = dict(zip(asked, texts, strict=True))
        return [replies.get(place, "") for place in range(len(batch))]  # to nothing, nothing

    def _sampling(self, options):
        if options.get("num_beams") not in _SINGLE_BEAM:
            raise InputError(f"num_beams is {options['num_beams']}; only one beam is searched here, pass num_beams=1")
        until = options.get("until") or []
        sampling = {
            "max_new_tokens": _number("max_new_tokens", options.get("max_new_tokens") or self.max_new_tokens, int),
            "stop": [stop for stop in ([until] if isinstance(until, str) else until) if stop],
        }
        if options.get("do_sample", bool(options.get("temperature"))) and options.get("temperature"):
            sampling["temperature"] = _number("temperature", options["temperature"], float)
            sampling["top_p"] = _number("top_p", options.get("top_p") or 1.0, float)
        return sampling

    def loglikelihood(self, requests):
        """For each request (log-probability of its continuation as the whole reply, its end included; whether the model
        would write just that)."""
        results = []
        for request in tqdm(requests, unit="question", disable=self.rank != 0):
            context, continuation, to_visual, id, task, split = request.args
            document = self.task_dict[task][split][id]
            text = continuation if isinstance(continuation, str) else continuation(document)
            if not text.strip():
                raise InputError(
                    f"document {id} of {task}: a continuation is empty, which has no likelihood; leave it out"
                )
            shown = list(to_visual(document) or ())
            turns = [Turn("user", context.replace(MARKER, ""), len(shown)), Turn("assistant", text)]
            results.append(self._likelihood(turns, shown))
        return results

    @torch.inference_mode()
    def _likelihood(self, turns, pictures):
        processor, inputs = self.vlm.processor, {}
        ids, labels = (torch.tensor(row) for row in processor.encode_turns(turns))
        if pictures:
            pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(self.device)
        logits = self.vlm.model(input_ids=ids[None].to(self.device), **inputs).logits[0]
        places = (labels >= 0).nonzero()[:, 0]  # the reply's, each written by the scores of the position before it
        scores = logits[(places - 1).to(self.device)].float().log_softmax(-1).cpu()
        wanted = ids[places]
        return float(scores.gather(1, wanted[:, None]).sum()), bool((scores.argmax(-1) == wanted).all())

    def generate_until_multi_round(self, requests):
        """Not needed by the benchmarks of this project."""
        raise NotImplementedError("VisualRWKV answers generate_until tasks; choose a task of one round")


def _number(name, given, kind):
    """A setting, which lmms-eval may pass as a string."""
    try:
        number = kind(given)
        if number > 0:
            return number
    except (TypeError, ValueError):
        pass
    raise InputError(f"{name} is {given!r}; use a {'whole number from 1' if kind is int else 'number above 0'}")
