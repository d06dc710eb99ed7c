"""TextVQA: questions about text in pictures, with the words that an OCR system read in the prompt."""

import re

from visualrwkv.errors import InputError
from visualrwkv.eval.common import SHORT, Benchmark, Question, understood, write_json
from visualrwkv.eval.normalise import evalai, soft_accuracy
from visualrwkv.eval.scores import mean_scores

ORIGIN = "TextVQA 0.5.1 (textvqa.org)"
_FILES = {"val": "TextVQA_0.5.1_val.json", "test": "TextVQA_0.5.1_test.json"}
_OCR = {"val": "TextVQA_Rosetta_OCR_v0.2_val.json", "test": "TextVQA_Rosetta_OCR_v0.2_test.json"}
_OCR_LINE = re.compile(r"\nReference OCR token:[^\n]*")


class TextVQA(Benchmark):
    """Soft accuracy after the M4C processor. Ids are those of pictures, as in the LLaVA pack, so they repeat."""

    name = "textvqa"
    title = "TextVQA"
    splits = {"val": ("llava_textvqa_val_v051_ocr.jsonl",), "test": ()}
    folders = ("train_images", "images/textvqa/train_images", "images", ".")
    settings = {"ocr": (True, False)}
    protocols = {"paper": "M4C evaluator, as VisualRWKV and LLaVA use it"}

    exported = Benchmark.scored  # the file takes more than questions from the official files

    def official(self, split):
        return (_FILES[split],)

    def from_pack(self, records):
        for question in super().from_pack(records):
            if not self.chosen["ocr"]:
                question.text = _OCR_LINE.sub("", question.text)
            yield question

    def _records(self):
        path, content = self.read(_FILES[self.split], origin=ORIGIN, what="an annotation file of TextVQA")
        self.source = path
        with understood(path, "an annotation file of TextVQA"):
            return path, content["data"]

    def questions(self):
        if self.chosen["ocr"] and not self._questions and not any((self.data / n).exists() for n in self._packs()):
            self.find(*self._packs(), _OCR[self.split], origin="the LLaVA pack (eval.zip), or pass --no-ocr")
        return super().questions()

    def _packs(self):
        return self.splits[self.split]

    def convert(self):
        tokens = {}
        if self.chosen["ocr"] and (self.data / _OCR[self.split]).exists():
            path, content = self.read(_OCR[self.split], origin=ORIGIN, what="a Rosetta OCR file of TextVQA")
            with understood(path, "a Rosetta OCR file of TextVQA"):
                tokens = {record["image_id"]: record["ocr_tokens"] for record in content["data"]}
        path, records = self._records()
        with understood(path, "an annotation file of TextVQA"):
            for record in records:
                image, line = record["image_id"], ""
                if image in tokens:
                    line = f"\nReference OCR token: {', '.join(tokens[image])}"
                text = record["question"][:1].upper() + record["question"][1:]
                yield Question(image, text + line + SHORT, f"{image}.jpg")

    def gold(self, questions):
        path, records = self._records()
        if any("answers" not in record for record in records):
            raise InputError(f"{path}: holds no answers; use `visualrwkv export textvqa` for the test split")
        with understood(path, "an annotation file of TextVQA with answers"):
            for record in records:
                if not isinstance(record["answers"], list) or not record["answers"]:
                    raise ValueError(f"question {record['question_id']} has no list of answers")
            return [[str(answer) for answer in record["answers"]] for record in records]

    def judge(self, questions, gold, answers, protocol, seed=0):
        points = [_accuracy(answer, references) for answer, references in zip(answers, gold, strict=True)]
        return mean_scores("accuracy", points, answers, seed=seed)

    def export(self, questions, answers, out):
        _, records = self._records()
        pairs = zip(records, answers, strict=True)
        write_json(out, [{"question_id": record["question_id"], "answer": text or ""} for record, text in pairs])


def _accuracy(answer, references):
    if answer is None:
        return 0.0
    answer = evalai(answer)
    return soft_accuracy(sum(evalai(reference) == answer for reference in references), len(references))
