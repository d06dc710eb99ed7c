"""SEED-Bench (first version): multiple choice about pictures and middle frames of videos."""

from visualrwkv.eval.common import OPTION, Benchmark, Question, json_lines, letters, understood, write_text
from visualrwkv.eval.scores import group_means, mean_scores

_FILE = "SEED-Bench.json"
_FOLDERS = {"image": "SEED-Bench-image", "video": "SEED-Bench-video-image"}


class SEEDBench(Benchmark):
    """The text must be the letter. The official leaderboard ranks options by likelihood: another protocol."""

    name = "seedbench"
    title = "SEED-Bench"
    splits = {"test": ("llava-seed-bench.jsonl",)}
    folders = (".", "images")
    protocols = {"paper": "LLaVA's script: the text is the letter", "lmms-eval": "the first character, in any case"}

    def official(self, split):
        return (_FILE,)

    def _content(self):
        what = "SEED-Bench.json"
        path, content = self.read(_FILE, origin="SEED-Bench", what=what)
        self.source = path
        with understood(path, what):
            kinds = {number: name for name, number in content["question_type"].items()}
            for record in content["questions"]:
                _ = record["question_id"], record["data_type"], kinds[record["question_type_id"]]
            return content["questions"], kinds

    def convert(self):
        records, _ = self._content()
        with understood(self.source, "SEED-Bench.json"):
            for record in records:
                options = [record[f"choice_{letter}"] for letter in "abcd"]
                image = f"{_FOLDERS[record['data_type']]}/{record['data_id']}"
                if record["data_type"] == "video":  # the pack names the middle frame so
                    image = f"{_FOLDERS['video']}/{record['question_type_id']}_{record['question_id']}.png"
                text = record["question"] + letters(options) + OPTION
                yield Question(record["question_id"], text, image, str(record["question_type_id"]))

    def gold(self, questions):
        records, kinds = self._content()
        with understood(self.source, "SEED-Bench.json with answers"):
            return [(r["answer"], kinds[r["question_type_id"]], r["data_type"]) for r in records]

    def judge(self, questions, gold, answers, protocol, seed=0):
        points = []
        for answer, (letter, *_) in zip(answers, gold, strict=True):
            text = answer or ""
            points.append(float((text[:1].upper() if protocol == "lmms-eval" else text) == letter))
        scores = mean_scores("total accuracy", points, answers, {"type": [kind for _, kind, _ in gold]}, seed=seed)
        by_medium = group_means(points, [medium for *_, medium in gold])
        scores.values |= {f"{medium} accuracy": group["score"] for medium, group in by_medium.items()}
        return scores

    def export(self, questions, answers, out):
        pairs = zip(questions, answers, strict=True)
        write_text(out, json_lines({"question_id": str(q.id), "prediction": answer or ""} for q, answer in pairs))
