"""The mmengine hooks for checkpoints: the structure of pruned models, and files that are never half."""

from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from mmprune.distributed import broadcast, raise_together, rebuild_reducers
from mmprune.errors import PruneError
from mmprune.mm.atomic_files import ATOMIC, latest_readable
from mmprune.mm.checkpoint import read_checkpoint
from mmprune.mm.hooks.running import unwrapped
from mmprune.surgery.meta import META, plan_in, weights_in
from mmprune.surgery.plan import plan_of


@HOOKS.register_module()
class AtomicCheckpointHook(Hook):
    """Makes every ``CheckpointHook`` that writes to a local disk write beside the file's name and
    rename, and remove old files only after that. A ``CheckpointHook`` with ``backend_args`` is left
    alone."""

    def before_train(self, runner: Runner) -> None:
        write_atomically(runner)


@HOOKS.register_module()
class RebuildHook(Hook):
    """Makes testing, ``resume`` and ``load_from`` work with pruned checkpoints.

    The plan of a checkpoint is applied to the model of the unpruned config before the weights are
    loaded. Checkpoints that are written have the plan in their meta, and their files are written as by
    :class:`AtomicCheckpointHook`.
    """

    # Before EMAHook copies the model.
    priority = 'ABOVE_NORMAL'

    def before_run(self, runner: Runner) -> None:
        """Gives the fresh model the structure of the checkpoint that will be loaded."""
        if runner._resume and runner._load_from is None:
            with raise_together('looking for a checkpoint'):
                latest = latest_readable(runner.work_dir, read_checkpoint, runner.logger.warning)
            runner._load_from = broadcast(latest)  # mmengine would take a truncated one as well
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
            # The weights come from the checkpoint; initial ones may not even fit the model any more.
            model._is_init = True
            runner.logger.info(f'Rebuilt the pruned structure of {path}: {plan}')

    def before_train(self, runner: Runner) -> None:
        write_atomically(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Raises an error if a tensor of a pruned checkpoint does not fit. mmengine would skip it."""
        plan = plan_in(checkpoint)
        if plan is None:
            return
        state = weights_in(checkpoint, runner._load_from)
        differ = [
            f'{name}: {tuple(state[name].shape) if name in state else "none"} in the checkpoint, '
            f'{tuple(tensor.shape)} in the model'
            for name, tensor in unwrapped(runner.model).state_dict().items()
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


def write_atomically(runner: Runner) -> None:
    """See :class:`AtomicCheckpointHook`."""
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook) or hook.backend_args or hook.file_client_args:
            continue
        if '://' not in str(hook.out_dir):
            hook.backend_args = dict(ATOMIC)
