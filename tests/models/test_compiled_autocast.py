"""torch.compile under autocast: the whole training forward of every family is one graph."""

import pytest
import torch
from tiny_models import FAMILIES, make_images, make_model

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.uninitialised_memory
@every_family
# torch traces an autograd.Function by what it warns of itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_training_forward_compiles_into_one_graph(family: str):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = make_model(family).train(), make_model(family).train()
    forward = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        losses = []
        for model, run in ((eager, eager), (compiled, forward)):
            torch.manual_seed(seed)
            with torch.autocast("cpu", torch.bfloat16):
                loss = run(make_images(4)).loss
            loss.backward()
            # Not after every forward: a counter of forwards must not make a new graph of each.
            if seed == 1:
                model.step()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-2, atol=0)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()
    for one, other in zip(eager.state_dict().values(), compiled.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
