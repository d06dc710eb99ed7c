"""How replies about drawn scenes are scored, and how accuracy is counted."""

import json


def test_scoring_of_replies():
    from visualrwkv.scenes.accuracy import is_right

    assert is_right("colour", "red", " Red.") and not is_right("colour", "red", "dark red")
    truth = "The image shows, from left to right, a small red circle, a large blue star and a sign with the number 7."
    other = "The image shows, from left to right, a large blue star, a small red circle and a sign with the number 7."
    assert is_right("describe", truth, truth) and is_right("describe", truth, other)
    assert not is_right("describe", truth, truth.replace("blue", "green"))
    assert not is_right("describe", truth, truth.replace(", a large blue star", ""))
    assert is_right(
        "describe",
        "图中从左到右有一个小的红色圆形和一个写着7的牌子。",
        "图中从左到右有一个写着7的牌子和一个小的红色圆形。",
    )


def test_accuracy_is_counted_by_kind(vlm, random_folder, capsys):
    from visualrwkv.scenes.accuracy import main

    assert main([str(random_folder), "--pictures", "2", "--json", "--blind"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["blind"] and result["counts"]["describe"][1] == 2 and "short" in result["shares"]
    assert main([str(random_folder), "--pictures", "2", "--json", "--follow-up", "--look-again"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["look_again"] and result["counts"]["describe"] == [0, 0] and "short" in result["shares"]
    assert main([str(random_folder), "--pictures", "0"]) == 2
    assert main([str(random_folder), "--look-again"]) == main([str(random_folder), "--follow-up", "--blind"]) == 2
