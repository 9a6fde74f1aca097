"""What the package may import, and that its files about itself agree."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

import faiss_knn
from faiss_knn.offline.formats import OPENERS
from tests.conftest import SLOW

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PYPROJECT["project"]["optional-dependencies"]
ENVIRONMENTS = {"gpu": ROOT / "environment.yml", "cpu": ROOT / "environment-cpu.yml"}


def imports(path):
    found = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
    return {name for name in found if not name.startswith("__")}


def test_one_file_imports_faiss_and_only_online_imports_lightning():
    for path in (ROOT / "faiss_knn").rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert "faiss" not in roots or path.name == "faiss_library.py", path
        assert not roots & {"lightning", "pytorch_lightning"} or path.parent.name == "online", path


def test_the_map_names_files_that_are_there():
    named = set(re.findall(r"[\w/]+\.py", (ROOT / "ARCHITECTURE.md").read_text()))
    files = {str(path.relative_to(ROOT)) for path in ROOT.glob("*/**/*.py") if path.parts[-1] != "__init__.py"}
    assert len(named) > 30
    for name in named:
        assert any(f"/{file}".endswith(f"/{name}") for file in files), name


def test_the_map_has_every_file_in_its_room():
    rooms = (ROOT / "ARCHITECTURE.md").read_text().split("## The rooms\n\n```text\n")[1].split("```")[0]
    placed, room = [], ""
    for line in rooms.splitlines():
        room = line.split()[0] if line and not line.startswith(" ") else room
        placed += [f"{room}{name}".removeprefix("faiss_knn/") for name in re.findall(r"\b\w+\.py\b", line)]
    package = ROOT / "faiss_knn"
    files = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    missing, gone = files - set(placed), set(placed) - files
    assert not missing, f"give each a line under its room in ARCHITECTURE.md: {sorted(missing)}"
    assert not gone, f"ARCHITECTURE.md names what is not there: {sorted(gone)}"


@pytest.mark.parametrize(
    ("floor", "above"),
    [
        ("names.py", ("protocol", "distributed", "search", "classify", "measures", "online", "offline")),
        ("protocol.py", ("distributed", "search", "classify", "measures", "online", "offline")),
        ("distributed.py", ("search", "classify", "measures", "online", "offline")),
        ("search", ("classify", "measures", "online", "offline")),
        ("search/engines", ("search.index", "search.sharded")),
        ("classify", ("measures", "online", "offline")),
        ("measures", ("online", "offline")),
        ("sklearn.py", ("measures", "online", "offline")),
        ("online", ("offline",)),
        ("offline", ("online",)),
        ("offline/report", ("search", "classify", "measures", "distributed")),
    ],
)
def test_imports_go_one_way(floor, above):
    place = ROOT / "faiss_knn" / floor
    paths = [place] if place.is_file() else list(place.rglob("*.py"))
    assert paths
    for path in paths:
        for name in imports(path):
            assert not name.startswith(tuple(f"faiss_knn.{room}" for room in above)), f"{path} imports {name}"


def test_faiss_is_an_extra_and_never_a_requirement():
    assert not [need for need in PYPROJECT["project"]["dependencies"] if "faiss" in need]
    assert {"cpu", "gpu", "cuvs"} <= set(EXTRAS)


def test_the_version_is_said_once():
    assert PYPROJECT["project"]["dynamic"] == ["version"]
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "faiss_knn.__version__"}
    said = [path for path in (ROOT / "faiss_knn").rglob("*.py") if f'"{faiss_knn.__version__}"' in path.read_text()]
    assert said == [ROOT / "faiss_knn/__init__.py"]


def test_the_distribution_has_one_name_everywhere():
    assert PYPROJECT["project"]["name"] == "faiss-knn-eval"
    assert list(PYPROJECT["project"]["scripts"]) == ["faiss-knn"]
    for extra in re.findall(r"faiss-knn[\w-]*\[", (ROOT / "pyproject.toml").read_text()):
        assert extra == "faiss-knn-eval["
    for path in [*(ROOT / "faiss_knn").rglob("*.py"), *ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"pip install [^\n]*faiss-knn(?!-eval)", path.read_text()), path


def test_pythons_are_the_same_everywhere():
    classifiers = re.findall(r"Python :: (3\.\d+)", str(PYPROJECT["project"]["classifiers"]))
    assert classifiers == ["3.11", "3.12", "3.13", "3.14"]
    assert PYPROJECT["project"]["requires-python"] == ">=3.11"
    assert "Python 3.11 to 3.14" in (ROOT / "README.md").read_text()
    assert "(3, 11, 5) <= sys.version_info < (3, 15)" in (ROOT / "scripts/setup.sh").read_text()
    for path in ENVIRONMENTS.values():
        assert "python>=3.11,<3.15" in yaml.safe_load(path.read_text())["dependencies"]


def bounds(spec):
    name, bound = re.fullmatch(r"([A-Za-z0-9_.-]+?)\s*([<>=!].*)?", spec).groups()
    return name.lower(), set((bound or "").split(",")) - {""}


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_environment_files_agree_with_pyproject(kind):
    environment = yaml.safe_load(ENVIRONMENTS[kind].read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    specs = dict(bounds(spec) for spec in environment["dependencies"] if isinstance(spec, str))
    pip = next(entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    assert pip == ["-e ."]
    assert {f"pytorch-{kind}", f"faiss-{kind}", "pytest"} <= set(specs)
    for need in PYPROJECT["project"]["dependencies"]:
        name, wanted = bounds(need)
        if name != "torch":
            assert wanted <= specs[name], name
    assert {"!=2.6.2", "!=2.6.3"} <= specs["lightning"]
    assert not {"torch", "faiss", "pytorch"} & set(specs)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == faiss_knn.__version__
    assert citation["license"] == PYPROJECT["project"]["license"]
    assert [author["name"].lower() for author in citation["authors"]] == [PYPROJECT["project"]["authors"][0]["name"]]


def test_the_changelog_has_a_place_for_what_comes_next():
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+ - \d{4}-\d\d-\d\d", heading) for heading in headings[1:])


def test_what_contributors_are_told_of_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    places = [
        ROOT,
        ROOT / "faiss_knn",
        ROOT / "faiss_knn/search/engines",
        ROOT / "faiss_knn/offline",
        *ROOT.glob("tests/*"),
    ]
    for name in re.findall(r"[\w/]+\.(?:py|md|sh|toml|txt|cff)", text):
        assert name == "faiss_knn/offline/commands/NAME.py" or any((place / name).is_file() for place in places), name
    for script, word in re.findall(r"^bash (\S+)(?: +(\w+))?", text, re.MULTILINE):
        assert not word or f"= {word} ]" in (ROOT / script).read_text(), word


def test_what_is_called_slow_is_there():
    for name in SLOW:
        path, _, test = name.partition("::")
        assert (ROOT / "tests" / path).exists(), name
        assert not test or f"def {test}(" in (ROOT / "tests" / path).read_text(), name


def test_what_may_happen_is_said_of_every_format():
    told = (ROOT / "SECURITY.md").read_text()
    for suffix in OPENERS:
        assert suffix in told, suffix


def test_pre_commit_runs_the_pinned_tools():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"].split()[0] for hook in hooks] == [".venv/bin/ruff", ".venv/bin/ruff", ".venv/bin/mypy"]
    pinned = {line.split("==")[0] for line in (ROOT / "scripts/constraints.txt").read_text().splitlines()}
    assert {"ruff", "mypy"} <= pinned & {need.split(">=")[0] for need in EXTRAS["test"]}


def test_the_conda_recipe_asks_for_what_pyproject_asks_for():
    recipe = yaml.safe_load((ROOT / "packaging/conda/recipe.yaml").read_text())
    project = PYPROJECT["project"]
    assert (recipe["context"]["name"], recipe["context"]["version"]) == (project["name"], faiss_knn.__version__)
    assert f">={recipe['context']['python_min']}" == project["requires-python"]
    scripts = [f"{name} = {target}" for name, target in project["scripts"].items()]
    assert recipe["build"]["python"]["entry_points"] == scripts
    assert set(PYPROJECT["build-system"]["requires"]) <= {n.replace(" ", "") for n in recipe["requirements"]["host"]}
    asked = dict(bounds(spec) for spec in recipe["requirements"]["run"] if not spec.startswith("python "))
    wanted = dict(bounds(need) for need in [*project["dependencies"], *EXTRAS["cpu"]])
    names = {"torch": "pytorch", "faiss-cpu": "faiss"}
    assert asked == {names.get(name, name): bound for name, bound in wanted.items()}


def steps(workflow):
    jobs = yaml.safe_load((ROOT / ".github/workflows" / workflow).read_text())["jobs"]
    return [step for job in jobs.values() for step in job.get("steps", [])]


def test_hosted_runs_call_the_scripts_of_a_developer():
    for workflow in ("tests.yml", "docs.yml"):
        commands = [step["run"] for step in steps(workflow) if "run" in step]
        assert commands
        for command in commands:
            assert re.fullmatch(r"bash scripts/\w+\.sh", command)
            assert (ROOT / command.split()[1]).is_file()
    tests = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert tests["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]


def test_publishing_holds_no_password_and_comes_after_the_tests():
    publish = yaml.safe_load((ROOT / ".github/workflows/publish.yml").read_text())
    assert publish["jobs"]["publish"]["needs"] == "tests"
    assert publish["jobs"]["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github/workflows/publish.yml").read_text()
    assert {"name": "dist", "path": "dist"} in [step.get("with") for step in steps("tests.yml")]
