"""Compensation for removed channels: their share moves into the weights of the kept channels.

The problem: a layer that reads channels computes ``y = W_k x_k + W_r x_r`` from kept channels ``x_k``
and removed channels ``x_r``. A cut drops the second term. The idea: fit ``x_r`` by ``A x_k + c``, by
least squares on training data. Then ``(W_k + W_r A) x_k + W_r c`` is the best that the narrower layer
can do.

Example: channel 5 always equals half of channel 0. Then ``A`` is 0.5 in the row of channel 5 and the
column of channel 0, half of the weight for channel 5 is added to the weight for channel 0, and nothing
is lost.

Source: He et al., *Channel Pruning for Accelerating Very Deep Neural Networks*, ICCV 2017. As in Kim et
al., *Neuron Merging*, NeurIPS 2020, the regression is between channels, so it holds at each kernel
position.

Unbounded least squares can ruin a layer. If the removed channels carry much power and the kept channels
a thousandth of it (as on a pyramid level that the data hardly uses), the fit multiplies the weak
channels by hundreds. It is right on its batch, but the layer then amplifies every change of its input,
and the next optimizer steps make the training diverge. Three bounds prevent this:

1. The ridge is a fraction of the mean power of *all* inputs, so weak channels are not scaled up.
2. The norm of a layer's weight grows at most by the root of (channels before / channels after). Merging
   equal channels needs that much, and over many cuts the factors multiply to that of one cut.
3. A layer is compensated only if that lowers the error of its output on samples outside the fit.
"""

from mmprune.compensation.fit import Compensation
from mmprune.compensation.moments import InputMoments

__all__ = ['Compensation', 'InputMoments']
