"""VizWiz: questions that blind people asked about their own pictures; some cannot be answered."""

from visualrwkv.errors import InputError
from visualrwkv.eval.common import SHORT, Benchmark, Question, understood, write_json
from visualrwkv.eval.normalise import VIZWIZ_CONTRACTIONS, evalai, punctuation, soft_accuracy, spaces, words
from visualrwkv.eval.scores import mean_scores, ratio

ORIGIN = "VizWiz-VQA (Annotations.zip of vizwiz.org)"
_HINT = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """Soft accuracy of the official evaluator; val is scored here, test by the server."""

    name = "vizwiz"
    title = "VizWiz"
    splits = {"val": ("questions.jsonl",), "test": ("llava_test.jsonl",)}
    folders = ("val", "test", "images", ".")
    protocols = {
        "official": "official evaluator on exported answers, as the server does",
        "official-raw": "official evaluator on answers as they are",
        "lmms-eval": "lmms-eval's vizwiz_vqa_val: both sides through the EvalAI processor",
    }
    fill_missing = False  # the export of an incomplete run is refused unless this is set

    def official(self, split):
        return (f"{split}.json",)

    def _records(self):
        path, records = self.read(f"{self.split}.json", origin=ORIGIN, what="an annotation file of VizWiz")
        self.source = path
        return path, records

    def convert(self):
        path, records = self._records()
        with understood(path, "an annotation file of VizWiz"):
            for record in records:
                number = int(record["image"].rpartition("_")[2].partition(".")[0])
                yield Question(number, record["question"] + _HINT + SHORT, record["image"])

    def gold(self, questions):
        path, records = self._records()
        if any("answers" not in record for record in records):
            raise InputError(f"{path}: holds no answers; use `visualrwkv export vizwiz` for the test split")
        with understood(path, "an annotation file of VizWiz"):
            for record in records:
                texts = [one["answer"] for one in record["answers"]]
                if not texts or not all(isinstance(text, str) for text in texts):
                    raise ValueError(f"{record['image']} has no answers, or one that is no text")
            return [{**record, "answers": [one["answer"] for one in record["answers"]]} for record in records]

    def judge(self, questions, gold, answers, protocol, seed=0):
        points = []
        for answer, record in zip(answers, gold, strict=True):
            references = record["answers"]
            if protocol == "lmms-eval":
                references, answer = [evalai(one) for one in references], answer and evalai(answer)
            elif answer is not None:
                answer = evalai(answer) if protocol == "official" else answer
                answer = words(punctuation(spaces(answer)), VIZWIZ_CONTRACTIONS)
            points.append(soft_accuracy(references.count(answer), len(references)) if answer is not None else 0.0)
        kinds = [record.get("answer_type", "unknown") for record in gold]
        scores = mean_scores("accuracy", points, answers, {"answer type": kinds}, seed=seed)
        scores.values |= _unanswerability(gold, answers)
        return scores

    def export(self, questions, answers, out):
        missing = [question.id for question, answer in zip(questions, answers, strict=True) if answer is None]
        if missing and not self.fill_missing:
            raise InputError(
                f"{out}: {len(missing)} questions have no prediction (first: id {missing[0]}); finish the run, or "
                "write 'unanswerable' for them with --fill-missing"
            )
        pairs = zip(questions, answers, strict=True)
        write_json(out, [{"image": q.image, "answer": "unanswerable" if a is None else evalai(a)} for q, a in pairs])


def _unanswerability(gold, answers):
    """Average precision and F1 of saying "unanswerable", from exported texts."""
    said = [answer is not None and evalai(answer) == "unanswerable" for answer in answers]
    true = [record.get("answerable") == 0 for record in gold]
    both, claimed, all_true = sum(map(all, zip(said, true, strict=True))), sum(said), sum(true)
    precision, recall = float(ratio(both, claimed)), float(ratio(both, all_true))
    # two levels of confidence: those called unanswerable, then everything
    average = recall * precision + (1 - recall) * float(ratio(all_true, len(true)))
    f1 = float(ratio(2 * precision * recall, precision + recall))
    return {"unanswerable, average precision": 100 * average, "unanswerable, F1": 100 * f1}
