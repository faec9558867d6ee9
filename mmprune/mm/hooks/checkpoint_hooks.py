"""The mmengine hooks for checkpoints: they rebuild pruned models, and write files that are complete."""

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
    """Makes every ``CheckpointHook`` write to a temporary file, rename it, and only then remove old
    files. A ``CheckpointHook`` that has ``backend_args`` or writes to a remote folder is not
    changed."""

    def before_train(self, runner: Runner) -> None:
        write_atomically(runner)


@HOOKS.register_module()
class RebuildHook(Hook):
    """Makes testing, ``resume`` and ``load_from`` work with pruned checkpoints.

    The plan of a checkpoint is applied to the model of the unpruned config before the weights are
    loaded. The plan is saved in the meta of each checkpoint, and checkpoint files are written as with
    :class:`AtomicCheckpointHook`.
    """

    # Runs before EMAHook, which copies the model.
    priority = 'ABOVE_NORMAL'

    def before_run(self, runner: Runner) -> None:
        """Gives the new model the structure of the checkpoint that will be loaded."""
        if runner._resume and runner._load_from is None:
            with raise_together('looking for a checkpoint'):
                latest = latest_readable(runner.work_dir, read_checkpoint, runner.logger.warning)
            runner._load_from = broadcast(latest)  # mmengine would also take a truncated file
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
            # The weights come from the checkpoint, so none are initialised: pretrained weights may no
            # longer fit the model.
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
    """Makes the ``CheckpointHook``s of a runner write as :class:`AtomicCheckpointHook` describes."""
    for hook in runner.hooks:
        if not isinstance(hook, CheckpointHook) or hook.backend_args or hook.file_client_args:
            continue
        if '://' not in str(hook.out_dir):
            hook.backend_args = dict(ATOMIC)
