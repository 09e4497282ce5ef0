"""The import graph: which way it runs, and that it has no circle. Lazy imports count, imports for type checkers only do not."""

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest

grimp = pytest.importorskip("grimp")

BASE = {"nnssl.pretrain.methods.base", "nnssl.pretrain.methods.registry"}

# What a package must not reach, over however many modules.
FORBIDDEN = {
    "nnssl.plans": ["nnssl.networks", "nnssl.weights"],
    "nnssl.networks": ["nnssl.weights"],
    "nnssl.weights": ["nnssl.pretrain", "nnssl.trainers"],
    "nnssl.losses": ["nnssl.plans", "nnssl.networks", "nnssl.pretrain"],
    "nnssl.heads": ["nnssl.plans", "nnssl.pretrain"],
    "nnssl.masking": ["nnssl.plans", "nnssl.pretrain"],
    "nnssl.probe": ["nnssl.trainers", "nnssl.pretrain"],
    "nnssl.transferability": ["nnssl.trainers", "nnssl.pretrain.engine", "nnssl.pretrain.omni"],
    "nnssl.trainers": ["nnssl.pretrain.engine", "nnssl.pretrain.omni", "nnssl.pretrain.methods"],
    "nnssl.pretrain.types": ["nnssl.pretrain.data", "nnssl.pretrain.methods"],
    "nnssl.pretrain.data": ["nnssl.pretrain.prepare", "nnssl.pretrain.methods", "nnssl.pretrain.engine"],
    "nnssl.pretrain.augment": ["nnssl.pretrain.data", "nnssl.pretrain.methods", "nnssl.pretrain.engine"],
    "nnssl.pretrain.engine": ["nnssl.pretrain.prepare", "nnssl.pretrain.omni", "nnssl.pretrain.api"],
    "nnssl.pretrain.methods": ["nnssl.pretrain.data", "nnssl.pretrain.engine", "nnssl.pretrain.omni"],
    "nnssl.pretrain": ["nnssl.trainers"],
}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("nnssl", cache_dir=None, exclude_type_checking_imports=True)


def objectives(graph):
    return graph.find_children("nnssl.pretrain.methods") - BASE


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_imports_run_one_way(graph, importer):
    for imported in FORBIDDEN[importer]:
        chain = graph.find_shortest_chain(importer=importer, imported=imported, as_packages=True)
        assert chain is None, " -> ".join(chain)


@pytest.mark.parametrize("package", ["data", "engine", "augment", "prepare", "omni", "types", "api", "cli"])
def test_nothing_but_the_registry_knows_an_objective(graph, package):
    found = objectives(graph)
    assert len(found) >= 7
    for objective in found:
        for module in objective, *graph.find_descendants(objective):
            chain = graph.find_shortest_chain(f"nnssl.pretrain.{package}", module, as_packages=False)
            chain = chain or graph.find_shortest_chain(f"nnssl.pretrain.{package}", module, as_packages=True)
            assert chain is None, " -> ".join(chain)


def test_nothing_imports_experiments(graph):
    inside = {"nnssl.experiments", *graph.find_descendants("nnssl.experiments")}
    from_outside = {m for e in inside for m in graph.find_modules_that_directly_import(e)} - inside
    assert from_outside == set()


def test_there_is_no_circle(graph):
    imports = {m: graph.find_modules_directly_imported_by(m) - {m} for m in graph.modules}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_the_links_are_followed(graph):
    """Else the rules above would hold for want of modules."""
    for package in ("pretrain", "trainers", "experiments"):
        assert len(graph.find_descendants(f"nnssl.{package}")) > 5


def test_the_objectives_load_without_what_only_a_transformer_needs():
    code = (
        "import sys; from nnssl.pretrain.methods.registry import discover; discover(); sys.exit('timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
