"""MM-Vet: open questions whose long answers a language model grades elsewhere."""

from visualrwkv.errors import InputError
from visualrwkv.eval.common import Benchmark, Question, understood, write_json


class MMVet(Benchmark):
    """Answers only. Papers allow 1,024 new tokens; VisualRWKV's own runs stop at 128."""

    name = "mmvet"
    title = "MM-Vet"
    folder = "mm-vet"
    splits = {"test": ("llava-mm-vet.jsonl", "questions.jsonl")}
    folders = ("images", "mm-vet/images", ".")

    def official(self, split):
        return ("mm-vet.json",)

    def key(self, id):
        return str(id).removeprefix("v1_")

    def convert(self):
        what = "mm-vet.json of MM-Vet"
        path, content = self.read("mm-vet.json", origin="MM-Vet (mm-vet.zip)", what=what)
        self.source = path
        with understood(path, what):
            for id, record in content.items():
                yield Question(int(self.key(id)), record["question"], record["imagename"])

    def gold(self, questions):
        raise InputError(
            f"{self.name} has no local score: its answers are graded by GPT-4; write the file for the grader with "
            f"`visualrwkv export {self.name}`"
        )

    def export(self, questions, answers, out):
        pairs = zip(questions, answers, strict=True)
        write_json(out, {f"v1_{q.id}": answer for q, answer in pairs if answer is not None}, indent=1)
