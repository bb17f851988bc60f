"""What a run says of itself before its first step."""

from types import SimpleNamespace

from tests.pretrain.acting import acting_fixtures
from tests.pretrain.token_fixtures import ARM, make
from tiphys.launch.run import _in_vocabulary


def test_the_parameters_of_the_vocabulary_are_those_that_grow_with_it() -> None:
    models = [acting_fixtures.model(make([ARM], "bc", text=text, context=60)) for text in (300, 700)]
    sizes = [sum(p.numel() for p in model.parameters()) for model in models]
    small, large = (_in_vocabulary(SimpleNamespace(module=model, config=model.config)) for model in models)
    assert large - small == sizes[1] - sizes[0]
    assert small == 2 * 32 * models[0].config.vocab_size
