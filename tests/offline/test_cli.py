"""The program as its user meets it: what it prints, writes, refuses, and how it goes on after a cut."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from faiss_knn import __version__, extract
from faiss_knn.offline.cli import main, parse

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(0)
    for name, n in (("bank", 120), ("queries", 40)):
        labels = rng.integers(0, 4, n)
        np.savez(folder / f"{name}.npz", features=rng.standard_normal((n, 8)) + labels[:, None], labels=labels)
    return str(folder / "bank.npz"), str(folder / "queries.npz")


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "results.jsonl").read_text().splitlines()]


def test_without_files_it_evaluates_the_digits(capsys):
    assert main(["eval", "--k", "1", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "bank 1,347 x 64, queries 450 x 64"
    assert out.splitlines()[1].split()[:3] == ["index", "k", "T"]
    assert out.splitlines()[2].split()[:5] == ["flat", "1", "0.07", "inverse", "99.33"]
    assert err == ""  # no progress in a pipe


def test_options_reach_the_records(files, tmp_path):
    out = tmp_path / "out"
    options = "--k 2 3 --temperature 0.1 1 --weighting softmax uniform --distance euclidean --index flat IVF4,Flat "
    options += "--sweep nprobe=1,4 --metric MulticlassF1Score --latency 3 --depth 50 --seed 7 --num-classes 6"
    assert main(["eval", *files, *options.split(), "--out", str(out), "--save-neighbors"]) == 0
    found = records(out)
    assert len(found) == 3 * 2 * 2 * 2
    assert {r["spec"] for r in found} == {"flat", "IVF4,Flat"}
    assert [r["settings"] for r in found[8::8]] == [{"nprobe": 1}, {"nprobe": 4}]
    first = found[0]
    assert (first["k"], first["temperature"], first["weighting"]) == (2, 0.1, "softmax")
    assert (first["distance_metric"], first["num_classes"], first["seed"]) == ("euclidean", 6, 7)
    assert first["MulticlassF1Score"] > 0
    assert first["latency_p95_ms"] > 0
    assert np.load(out / "neighbors.npz")["indices/flat"].shape == (40, 50)
    assert (out / "report.html").exists()


@pytest.mark.parametrize("program", [["-m", "faiss_knn", "eval"], [str(ROOT / "scripts" / "index_eval.py")]])
def test_each_way_to_start_it_is_one_program(files, tmp_path, program):
    done = subprocess.run(
        [sys.executable, *program, *files, "--k", "5"],
        capture_output=True, text=True, cwd=ROOT if "-m" in program else tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3  # the sizes compared, the headings, one record


def test_few_shot_and_leave_one_out(files, tmp_path):
    assert main(["eval", *files, "--k", "1", "--per-class", "3", "--tries", "4", "--out", str(tmp_path / "a")]) == 0
    (few,) = records(tmp_path / "a")
    assert (few["n_bank"], few["tries"]) == (12, 4)
    assert few["top1_std"] > 0
    assert main(["eval", files[0], "--leave-one-out", "--k", "1", "--out", str(tmp_path / "b")]) == 0
    (own,) = records(tmp_path / "b")
    assert (own["n_queries"], own["leave_one_out"]) == (120, True)
    assert own["top1"] < 1


def test_a_config_file_gives_options_and_the_command_line_wins(files, tmp_path):
    config = tmp_path / "eval.yaml"
    config.write_text(
        f"bank: {files[0]}\nqueries: {files[1]}\nk: [1, 7]\nweighting: uniform\nsweep: {{nprobe: [1, 2]}}\n"
        "index: ivf\nsave-neighbors: true\nout: from-config\n"
    )
    given = parse(["eval", "--config", str(config), "--weighting", "softmax", "--no-save-neighbors"])
    assert (given.bank, given.queries) == (Path(files[0]), Path(files[1]))
    assert (given.k, given.weighting, given.save_neighbors) == ([1, 7], ["softmax"], False)
    assert (given.sweep, given.out) == ([("nprobe", [1, 2])], Path("from-config"))


def test_a_dry_run_prints_sizes_and_evaluates_nothing(files, tmp_path, capsys):
    assert main(["eval", *files, "--dry-run", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "120 x 8" in out
    assert "under 1 s" in out
    assert not (tmp_path / "out").exists()


def test_class_names_and_labels_from_their_own_files(tmp_path, capsys):
    rng = np.random.default_rng(1)
    np.save(tmp_path / "bank.npy", rng.standard_normal((20, 4)))
    (tmp_path / "labels.txt").write_text("\n".join(["cat", "dog"] * 10))
    arguments = ["eval", str(tmp_path / "bank.npy"), "--leave-one-out", "--labels", str(tmp_path / "labels.txt")]
    assert main([*arguments, "--k", "3", "--out", str(tmp_path / "out")]) == 0
    assert "dog" in (tmp_path / "out" / "per_class.csv").read_text()
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    assert (
        main([*arguments, "--k", "3", "--class-names", str(tmp_path / "names.txt"), "--out", str(tmp_path / "o2")]) == 0
    )
    assert "flat,3,0.07,inverse,0,dog" in (tmp_path / "o2" / "per_class.csv").read_text()
    capsys.readouterr()


def test_version_and_help_answer_at_once(capsys):
    for arguments in (["--version"], ["eval", "--version"]):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert capsys.readouterr().out == f"faiss-knn {__version__}\n"
    code = (
        "import sys; from faiss_knn.offline.cli import main\ntry: main(['eval', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "print(sorted({'torch', 'numpy', 'faiss', 'lightning', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


BAD_DATA = {
    "no such file": (["nothing.npz", "nothing.npz"], "nothing.npz: no such file"),
    "no such file of labels": (["bank.npz", "bank.npz", "--labels", "lable"], "lable: no such file"),
    "no labels": (["bare.npy", "bare.npy"], "bare.npy: holds no labels: give them with --labels"),
    "no labels among the arrays": (["plain.npz", "bank.npz"], "--labels-key: it holds features (120, 8), sizes (5,)"),
    "no query labels": (["bank.npz", "bare.npy"], "bare.npy: holds no labels: give them with --query-labels"),
    "NaN": (["nan.npz", "nan.npz"], "`bank_features` must be finite, and not zero under cosine: row 2 is not"),
    "another dimension": (["bank.npz", "narrow.npz"], "`query_features` must have the bank's dimension 8, got 3"),
    "truncated": (["cut.npz", "bank.npz"], "cut.npz: cannot be read as .npz"),
    "an index that the width does not fit": (
        ["bank.npz", "bank.npz", "--index", "PQ7"],
        "error: --index must be 'flat',",
    ),
    "nprobe above nlist": (["bank.npz", "bank.npz", "--index", "IVF4,Flat", "--nprobe", "9"], "nprobe"),
    "numbers for classes": (
        ["numbers.npz", "--leave-one-out"],
        "got float64 with fractions: numbers that are no classes",
    ),
    "no such metric": (["bank.npz", "bank.npz", "--metric", "Quality"], "`metrics` must name"),
    "a metric of two classes": (
        ["bank.npz", "bank.npz", "--metric", "BinaryAccuracy"],
        "`metrics`: BinaryAccuracy does not go with class ids: take one of the Multiclass metrics",
    ),
    "a metric's odd argument": (
        ["bank.npz", "bank.npz", "--metric", "MulticlassF1Score(average=zzz)"],
        "cannot be made: ",
    ),
    "a metric's argument that is no value": (
        ["bank.npz", "bank.npz", "--metric", "MulticlassF1Score(average=a+b)"],
        "must have plain values, such as 3, None or 'micro', got 'MulticlassF1Score(average=a+b)'",
    ),
    "no such class names": (["bank.npz", "bank.npz", "--class-names", "n.txt"], "n.txt: no such file"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_one_line_and_exit_1(files, tmp_path, monkeypatch, capsys, case):
    monkeypatch.chdir(tmp_path)
    good = dict(np.load(files[0]))
    np.savez("bank.npz", **good)
    np.save("bare.npy", good["features"])
    np.savez("plain.npz", features=good["features"], sizes=np.arange(5))
    broken = good["features"].copy()
    broken[2, 1] = np.nan
    np.savez("nan.npz", features=broken, labels=good["labels"])
    np.savez("narrow.npz", features=good["features"][:, :3], labels=good["labels"])
    np.savez("numbers.npz", features=good["features"], labels=good["labels"] + 0.5)
    Path("cut.npz").write_bytes(Path("bank.npz").read_bytes()[:900])
    arguments, message = BAD_DATA[case]
    assert main(["eval", *arguments]) == 1
    err = capsys.readouterr().err
    assert err.startswith("faiss-knn: error: ")
    assert message in err
    assert err.count("\n") == 1


BAD_USAGE = {
    "no command": ([], "required: command"),
    "no queries": (["eval", "bank.npz"], "QUERIES is missing"),
    "too many": (["eval", "a", "b", "--leave-one-out"], "takes BANK alone"),
    "k of zero": (["eval", "--k", "0"], "must be a positive whole number, got '0'"),
    "temperature of nothing": (["eval", "--temperature", "0"], "must be above 0, got '0'"),
    "no number": (["eval", "--temperature", "nan"], "must be above 0, got 'nan'"),
    "temperature without end": (["eval", "--temperature", "inf"], "as float32 is, got 'inf'"),
    "temperature that vanishes": (["eval", "--temperature", "1e-46"], "as float32 is, got '1e-46'"),
    "seed below 0": (["eval", "--seed", "-1"], "must be a whole number, 0 or more, got '-1'"),
    "seed of no number": (["eval", "--seed", "x"], "must be a whole number, 0 or more, got 'x'"),
    "sweep of nothing": (["eval", "--sweep", "nprobe=1,2"], "--sweep is for other indexes than flat"),
    "nprobe of nothing": (["eval", "--nprobe", "4"], "--nprobe is for other indexes than flat"),
    "latency below 0": (["eval", "--latency", "-1"], "must be a whole number, 0 or more, got '-1'"),
    "sweep over nothing": (["eval", "--sweep", "nprobe="], "must be nprobe=1,4,16"),
    "storage of no kind": (["eval", "--storage-dtype", "int8"], "invalid choice: 'int8'"),
    "a label that is no number": (["eval", "--ignore-index", "x"], "must be a whole number, got 'x'"),
    "both ways": (["eval", "--out", "x", "--resume", "--overwrite"], "leave out one of them"),
    "overwrite what": (["eval", "--overwrite"], "--overwrite needs --out"),
    "a word for a number": (["eval", "--temperature", "warm"], "must be a number, got 'warm'"),
    "unknown weighting": (["eval", "--weighting", "loud"], "invalid choice: 'loud'"),
    "unknown option": (["eval", "--colour", "red"], "unrecognized arguments: --colour (see faiss-knn eval --help)"),
    "unknown sweep": (["eval", "--sweep", "speed=1"], "must be nprobe=1,4,16"),
    "recall above one": (["eval", "--target-recall", "1.5"], "must be in (0, 1]"),
    "resume what": (["eval", "--resume"], "--resume needs --out"),
    "nprobe of no lists": (
        ["eval", "--index", "flat", "fast", "--nprobe", "4"],
        "--nprobe is for indexes with inverted",
    ),
    "recall of flat": (["eval", "--target-recall", "0.9"], "--target-recall is for other indexes than flat"),
    "labels of no file": (["eval", "--labels", "y.npy"], "--labels is of files, and none is named"),
    "a key of no file": (["eval", "--features-key", "x"], "--features-key is of files, and none is named"),
    "parts of no file": (["eval", "--allow-partial"], "--allow-partial is of files, and none is named"),
    "labels of no queries": (["eval", "a", "--leave-one-out", "--query-labels", "y"], "--query-labels needs QUERIES"),
    "relevance elsewhere": (
        ["eval", "a", "b", "--relevance", "r.json", "--device", "cpu"],
        "--device does not go with --relevance",
    ),
    "labels of no runs' queries": (
        ["compare", "a", "b", "--leave-one-out", "--query-labels", "y"],
        "--query-labels is of QUERIES",
    ),
    "a set compared with none": (["audit", "a.npy", "--generative"], "--generative needs QUERIES"),
    "a set compared with a part": (
        ["audit", "a", "b", "--generative", "--sample", "9"],
        "--generative compares all rows: it does not go with --sample",
    ),
    "seed of no sample": (["audit", "a.npy", "--seed", "0"], "--seed is of the rows that are drawn"),
    "tries of what": (["eval", "--tries", "3"], "--tries needs --per-class"),
    "no such index": (["eval", "--index", "flat", "IVG4"], "argument --index: `index` must be 'flat'"),
    "an index of nothing": (["eval", "--index", "HNSW0"], "argument --index: `index` must have numbers above 1"),
    "no config": (["eval", "--config", "none.yaml"], "none.yaml"),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_one_line_and_exit_2(capsys, case):
    arguments, message = BAD_USAGE[case]
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("text", ["k: [0]", "colour: red", "- k", "k: [1", "weighting: loud"])
def test_a_bad_config_is_bad_usage(tmp_path, capsys, text):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--config", str(tmp_path / "c.yaml")])
    assert capsys.readouterr().err.count("\n") == 1


def test_what_was_done_before_a_cut_is_kept_and_not_done_again(files, tmp_path, monkeypatch, capsys):
    from faiss_knn.offline.report import report
    from faiss_knn.search.index import KNNIndex

    out, arguments = tmp_path / "out", ["eval", *files, "--k", "1", "5", "--index", "flat", "IVF4,Flat"]
    add, added = report.ResultsFolder.add, []

    def add_three(results_folder, *given):
        if len(added) == 3:
            raise KeyboardInterrupt
        added.append(given)
        add(results_folder, *given)

    monkeypatch.setattr(report.ResultsFolder, "add", add_three)
    assert main([*arguments, "--out", str(out)]) == 130
    assert "--resume goes on" in capsys.readouterr().err
    assert len(records(out)) == 3
    monkeypatch.setattr(report.ResultsFolder, "add", add)
    assert main([*arguments, "--out", str(out), "--resume"]) == 0
    done = records(out)
    assert [(r["spec"], r["k"]) for r in done] == [(s, k) for s in ("flat", "IVF4,Flat") for k in (1, 5)]
    assert done[:3] == [given[0] for given in added]
    assert len((out / "per_class.csv").read_text().splitlines()) == 1 + 4 * 4
    monkeypatch.setattr(KNNIndex, "build", None)  # a third run has nothing to search
    assert main([*arguments, "--out", str(out), "--resume"]) == 0


SUSPECT = {  # bank and queries of rows x, labels y, and what is said
    "classes -1 and +1": lambda x, y: (
        (x, y % 2 * 2 - 1),
        (x + 9, y % 2 * 2 - 1),
        "no class): 20 bank",
        "single class",
    ),
    "the bank asks itself": lambda x, y: ((x, y), (x, y), "40 queries are in the bank, number by number"),
    "in half precision": lambda x, y: ((x, y), (x.astype(np.float16), y), "40 queries are in the bank but for"),
    "scaled": lambda x, y: ((x, y), (3 * x, y), "a rounded or scaled copy has"),
    "classes that the bank lacks": lambda x, y: (
        (x, y),
        (x + 9, y + 4),
        "4 classes of the queries have no bank row",
    ),
    "no better than the commonest class": lambda x, y: ((x, y // 3 % 2), (x + 9, 0 * y), "no less than the"),
    "one class": lambda x, y: ((x, 0 * y), (x + 9, y), "The bank holds a single class"),
    "fewer rows than k": lambda x, y: ((x[:4], y[:4]), (x + 9, y % 2), "k = 5 is more than the bank has rows"),
}


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("case", SUSPECT)
def test_what_makes_a_number_suspect_is_said_on_stderr(tmp_path, capsys, case, out):
    rng = np.random.default_rng(3)
    bank, queries, *said = SUSPECT[case](rng.standard_normal((40, 8)), np.arange(40) % 4)
    for name, (features, labels) in (("bank", bank), ("queries", queries)):
        np.savez(tmp_path / f"{name}.npz", features=features, labels=labels)
    arguments = ["eval", str(tmp_path / "bank.npz"), str(tmp_path / "queries.npz"), "--k", "1", "5"]
    assert main([*arguments, *(["--out", str(tmp_path / "out")] if out else [])]) == 0
    err = capsys.readouterr().err
    for words in said:
        assert words in err
        assert not out or words in (tmp_path / "out" / "report.html").read_text()
    assert all(line.startswith("faiss-knn: warning: ") for line in err.splitlines())


def test_few_shot_warns_of_the_banks_that_were_drawn(files, capsys):
    assert main(["eval", *files, "--k", "20", "--per-class", "2", "--tries", "2"]) == 0
    assert "k = 20 is more than the bank has rows" in capsys.readouterr().err


def test_metrics_and_latency_are_in_the_table(files, capsys):
    assert main(["eval", *files, "--k", "1", "5", "--metric", "MulticlassF1Score", "--latency", "3"]) == 0
    heading, first, _ = capsys.readouterr().out.splitlines()[1:]
    assert heading.split()[-5:] == ["MulticlassF1Score", "p50", "ms", "p95", "ms"]
    assert all(float(cell) > 0 for cell in first.split()[-3:])


def test_options_for_odd_data_reach_the_evaluation(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((50, 4)), np.arange(50) % 3
    labels[:5], rows[7] = 255, np.nan
    np.savez(tmp_path / "bank.npz", features=rows, labels=labels)
    arguments = ["eval", str(tmp_path / "bank.npz"), "--leave-one-out", "--k", "3", "--ignore-index", "255"]
    assert main(arguments) == 1
    arguments += ["--skip-bad-rows", "--storage-dtype", "float64", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    err = capsys.readouterr().err
    assert "Left out as zero or not finite: 1 bank rows" in err
    assert "is no class): 5 bank rows" in err
    (record,) = records(tmp_path / "out")
    assert (record["n_bank"], record["num_classes"], record["storage_dtype"]) == (44, 3, "float64")
    assert (record["skipped_bank"], record["bank_file"]) == (1, str(tmp_path / "bank.npz"))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", record["created"])


def test_labels_of_a_name_in_a_file_of_their_own(files, tmp_path, capsys):
    both = dict(np.load(files[0]))
    np.save(tmp_path / "rows.npy", both["features"])
    np.savez(tmp_path / "labels.npz", fine=both["labels"], coarse=both["labels"] // 2)
    arguments = ["eval", str(tmp_path / "rows.npy"), "--leave-one-out", "--k", "3", "--labels"]
    shown = []
    for key in ("fine", "coarse"):
        assert main([*arguments, str(tmp_path / "labels.npz"), "--labels-key", key]) == 0
        shown.append(capsys.readouterr().out.splitlines()[2].split()[4])
    assert main(["eval", files[0], "--leave-one-out", "--k", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[4] == shown[0] != shown[1]


@pytest.mark.parametrize("way", ["a file", "a file's child", "results.jsonl is a folder"])
def test_a_folder_that_cannot_be_written_is_found_before_the_search(files, tmp_path, monkeypatch, capsys, way):
    from faiss_knn.search.index import KNNIndex

    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "results.jsonl").mkdir(parents=True)
    out = {"a file": "file", "a file's child": "file/out", "results.jsonl is a folder": "folder"}[way]
    monkeypatch.setattr(KNNIndex, "build", None)
    assert main(["eval", *files, "--out", str(tmp_path / out)]) == 1
    err = capsys.readouterr().err
    assert f"{tmp_path / out}: cannot be written" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("locale", [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                                    {"PYTHONIOENCODING": "ascii"}])  # fmt: skip
def test_names_and_signs_survive_any_locale(tmp_path, locale):
    rng = np.random.default_rng(0)
    names = ["猫", "犬", "café"]
    np.savez(tmp_path / "bank.npz", features=rng.standard_normal((30, 4)), labels=np.array(names)[np.arange(30) % 3])
    (tmp_path / "eval.yaml").write_text("# für\nclass-names: names.txt\n", encoding="utf-8")
    (tmp_path / "names.txt").write_text("\n".join(sorted(names)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", "-m", "faiss_knn", "eval", "bank.npz", "--leave-one-out", "--k",
         "3", "--config", "eval.yaml", "--out", "out"],
        capture_output=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)} | locale,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"faiss_knn/offline" not in done.stderr  # no EncodingWarning of ours
    for name in ("report.html", "report.md", "per_class.csv"):
        assert all(word in (tmp_path / "out" / name).read_text(encoding="utf-8") for word in names)
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text())["top1"] >= 0


def test_ctrl_c_ends_with_one_line(tmp_path):
    rng = np.random.default_rng(2)
    np.savez(
        tmp_path / "bank.npz", features=rng.standard_normal((60_000, 128), np.float32), labels=np.arange(60_000) % 9
    )
    arguments = ["eval", str(tmp_path / "bank.npz"), "--leave-one-out", "--out", str(tmp_path / "out")]
    running = subprocess.Popen(
        [sys.executable, "-m", "faiss_knn", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs start with it ignored
    )
    while not (tmp_path / "out").exists():  # made when the features have been read
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert err == "faiss-knn: stopped\n"  # nothing was done yet that could be gone on with


def test_a_part_of_an_extraction_is_evaluated_on_request_alone(tmp_path, capsys):
    def cut_off():
        for _ in range(6):
            yield torch.randn(4, 3), torch.arange(4) % 2
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError, match="cut"):
        extract(torch.nn.Identity(), cut_off(), tmp_path / "f", shard_rows=8)
    arguments = ["eval", str(tmp_path / "f"), "--leave-one-out", "--k", "1"]
    assert main(arguments) == 1
    assert "was cut off after 24 rows" in capsys.readouterr().err
    assert main([*arguments, "--allow-partial"]) == 0
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == ["flat", "1"]


def test_a_config_that_is_a_pipe_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(SystemExit, match="2"):
        main(["eval", "--config", str(tmp_path / "a.yaml")])
    assert "a.yaml: is no regular file" in capsys.readouterr().err


def test_what_makes_a_number_suspect_is_said_on_the_terminal(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((60, 4)).astype(np.float32)
    labels = np.arange(60) % 3
    np.savez(tmp_path / "bank.npz", features=rows, labels=labels)
    np.savez(tmp_path / "other.npz", features=rng.standard_normal((20, 4)).astype(np.float32), labels=np.full(20, 7))
    np.savez(tmp_path / "signs.npz", features=rows, labels=np.where(labels == 0, -1, 1))
    bank = str(tmp_path / "bank.npz")
    assert main(["eval", bank, bank]) == 0
    assert "60 queries are in the bank" in capsys.readouterr().err
    assert main(["eval", bank, str(tmp_path / "other.npz")]) == 0
    assert "1 classes of the queries have no bank row" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "signs.npz"), str(tmp_path / "signs.npz")]) == 0
    said = capsys.readouterr().err
    assert "Left out for want of a label" in said
    assert "20 bank rows" in said


def test_resume_notices_that_nearly_all_of_the_bank_is_another(tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows, labels = rng.standard_normal((2000, 8)).astype(np.float32), np.arange(2000) % 4
    rows[:, :4] += 6 * np.eye(4)[labels]
    np.savez(tmp_path / "queries.npz", features=rows[:200], labels=labels[:200])
    np.savez(tmp_path / "bank.npz", features=rows[200:], labels=labels[200:])
    command = [
        "eval",
        str(tmp_path / "bank.npz"),
        str(tmp_path / "queries.npz"),
        "--k",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 0
    other = labels[200:].copy()
    other[100:] = rng.permutation(other[100:])
    np.savez(tmp_path / "bank.npz", features=rows[200:], labels=other)
    assert main([*command, "--resume"]) == 0
    scores = [json.loads(line)["top1"] for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert scores[0] > 0.9 > scores[1]
