"""Compensation for removed channels: their share moves into the weights of the kept ones.

A layer that reads channels computes ``y = W_k x_k + W_r x_r`` from those that are kept and those that
are removed. If ``x_r`` is about ``A x_k + c``, found by least squares on training data, then
``(W_k + W_r A) x_k + W_r c`` is the nearest that the narrower layer can come: He et al., *Channel
Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017. The regression is between channels,
so it holds at every position of a kernel (as in Kim et al., *Neuron Merging*, NeurIPS 2020, which takes
one channel for each).

Least squares alone can ruin a layer. Example: the removed channels carry much power and the kept ones
a thousandth of it, as on a pyramid level that the data hardly uses. The fit then multiplies the weak
channels by hundreds. It is right on its batch, but the layer now amplifies every change of its input,
and the next optimizer steps blow it up. Three bounds prevent this:

1. The ridge is a fraction of the mean power of *all* inputs. Channels far below it are not scaled up.
2. The norm of a layer's weight grows at most by the root of (channels before / channels after). This is
   what merging equal channels needs, and over many cuts the factors multiply to that of one cut.
3. A layer is compensated only if that lowers the error of its output on samples outside the fit.
"""

from mmprune.compensation.fit import Compensation
from mmprune.compensation.moments import InputMoments

__all__ = ['Compensation', 'InputMoments']
