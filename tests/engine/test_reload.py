"""An engine that loads the weights of another checkpoint answers as that one, and no other."""

from checkpoints import CheckpointFactory, CheckpointSpec
from harness import Ask, Engine, Served, prompt
from oracle_model import OracleModel


def test_reloaded_weights(checkpoint: CheckpointFactory) -> None:
    first, second = (CheckpointSpec(seed=20), CheckpointSpec(seed=21))
    served = Served(first.block_length, "block_causal")
    options = {"enforce_eager": True, "enable_prefix_caching": False}
    engine = Engine.start(checkpoint(first), served, **options)
    asks = [Ask(prompt(9 + 20 * i, seed=i)) for i in range(4)]
    before = [result.token_ids for result in engine.assert_exact(asks)]
    path = str(checkpoint(second))
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": path})
    engine.oracle = OracleModel.load(checkpoint(second))
    after = [result.token_ids for result in engine.assert_exact(asks)]
    assert before != after
