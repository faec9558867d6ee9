"""The mmengine hook that gives a model the structure of its checkpoint, and checkpoints theirs."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.distributed import broadcast, raise_together, rebuild_reducers
from mmprune.errors import PruneError
from mmprune.mm.atomic_files import latest_readable
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.hooks.atomic_checkpoint_hook import AtomicCheckpointHook
from mmprune.mm.hooks.running import ensure_registered, unwrapped
from mmprune.surgery.meta import META, plan_in, weights_in
from mmprune.surgery.plan import plan_of


@HOOKS.register_module()
class RebuildHook(Hook):
    """Rebuilds what a checkpoint describes, in testing, ``resume`` and ``load_from`` alike: its plan is
    applied to the model of the unpruned config before the weights are loaded. Checkpoints that are
    written have the plan in their meta. Brings an :class:`AtomicCheckpointHook` along."""

    # Before EMAHook copies the model.
    priority = 'ABOVE_NORMAL'

    def before_run(self, runner: Runner) -> None:
        """Gives the fresh model the structure of the checkpoint that is going to be loaded."""
        ensure_registered(runner, AtomicCheckpointHook(), self.priority)
        if runner._resume and runner._load_from is None:
            with raise_together('looking for a checkpoint'):
                found = latest_readable(runner.work_dir, read_checkpoint, runner.logger.warning)
            runner._load_from = broadcast(found)  # mmengine would take a truncated one as well
        path = runner._load_from
        if path is None:
            return
        plan = plan_in(read_checkpoint(path))
        model = unwrapped(runner.model)
        if plan is None:
            runner.logger.info(f'{path} has no plan: it is of an unpruned model')
        elif plan_of(model) is None:
            plan.apply(model)
            rebuild_reducers(runner.model)
            # Its weights come from the checkpoint; initial ones may not even fit any more.
            model._is_init = True
            runner.logger.info(f'Rebuilt the pruned structure of {path}: {plan}')

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """mmengine skips tensors that do not fit; with a plan all of them must."""
        plan = plan_in(checkpoint)
        if plan is None:
            return
        model = unwrapped(runner.model)
        state = weights_in(checkpoint, runner._load_from)
        differ = [
            f'{name}: {tuple(state[name].shape) if name in state else "none"} in the checkpoint, '
            f'{tuple(tensor.shape)} in the model'
            for name, tensor in model.state_dict().items()
            if name not in state or state[name].shape != tensor.shape
        ]
        if differ:
            raise PruneError(
                'the weights of the checkpoint do not fit its own plan:\n  ' + '\n  '.join(differ[:5])
            )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        plan = plan_of(unwrapped(runner.model))
        if plan is not None:
            checkpoint['meta'][META] = plan.to_meta()
