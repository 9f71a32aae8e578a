"""Bayesian spike clustering as probabilistic programming: which spikes belong to which neuron, and how sure.

Spike sorting groups the spikes of an extracellular recording by their waveforms, each group one neuron, and here the
grouping is a **probabilistic program**: a [PyMC](04_models.ipynb) model of the spikes that you can read, change and
criticise, with inference that is [derived from that model](05_conjugate.ipynb). What comes back is not only a label for
each spike but a posterior: how many units there are, what their waveforms look like, and how probable the assignment of every
spike is.

Modules:

- `spike_ppl.alternatives`: Which other sortings, a split or a merge away from the best optimum, are nearly as probable, and how probable.
- `spike_ppl.closed_forms`: Which of a model's variables belong to one unit, found by trying; and the derived functions of a mixture of Gaussians in a few lines of NumPy, each checked against what was derived.
- `spike_ppl.clustering`: From found spikes to units: a PyMC mixture of the clear spikes of each area, matching, and a second look at each unit with everything else subtracted.
- `spike_ppl.clusters`: What is known of a clustering of spikes, lined up: labels, times and waveforms; the template of each unit and how sure it is; and which units look alike.
- `spike_ppl.comparison`: How well does a fit predict, against which other, and how much of it did the prior say?
- `spike_ppl.conditionals`: The distribution of one variable of a PyMC model given all others and the data, read off the model's own log-probability and checked against it.
- `spike_ppl.conjugate`: Gibbs and variational updates read off a PyMC model's own log-probability, by symbolic differentiation and enumeration.
- `spike_ppl.convergence`: Did the algorithm find the posterior at all? Chains compared by what does not depend on the names of units.
- `spike_ppl.criticism`: Should I trust this sort? Convergence, predictive checks, comparison, calibration, and a verdict in plain words.
- `spike_ppl.curation`: Merges, splits, removals and labels of units as a list of decisions that can be undone, saved, and applied by SpikeInterface as well.
- `spike_ppl.detection`: The noise of a recording made white over time and channels, spikes found in it by their energy, and windows cut at times between samples.
- `spike_ppl.drift`: How far the tissue has moved along the probe, and which templates are one neuron seen from different depths.
- `spike_ppl.experiments`: Keep fits, list them, compare them, and get them back in another process exactly as they were.
- `spike_ppl.explore`: The figures of this package, to move through: the recording, the units, the fits and the model itself, with sliders.
- `spike_ppl.families`: The families of distributions that Gibbs sampling and variational Bayes draw from: parameters read off a log density by differentiation, exact draws, and expectations without new algebra.
- `spike_ppl.gibbs`: Sweeps over all variables, exact steps that split and merge units, and the same sweep as a step method of PyMC's own.
- `spike_ppl.ground_truth`: When it says 90 %, is it right nine times in ten? And which of the true units did it find?
- `spike_ppl.inference`: Gibbs sampling, variational Bayes, split and merge moves, NUTS and ADVI for any mixture written in PyMC, behind one door: `fit`.
- `spike_ppl.joint`: What a PyMC model says about all of its variables together: one log density each, in natural space, with the observed values as inputs.
- `spike_ppl.losses`: How far two ways of grouping the same spikes are apart, and the search for the one that is nearest to many.
- `spike_ppl.matching`: All spikes of known templates, overlapping ones too, each with the probability that it is of its unit; and what is left over.
- `spike_ppl.models`: Mixture models of spikes, written in PyMC so that they can be read, changed and criticised.
- `spike_ppl.partition`: Which spikes belong together, how many units there are, and how sure the posterior is of both.
- `spike_ppl.passes`: Everything that inference asks of the data, in one pass that holds little memory and gives the same bits on any number of threads; and a partition to start from.
- `spike_ppl.plan`: What inference needs of a model's structure, derived and compiled once for all data; and a few weighted rows that stand for all spikes of a unit.
- `spike_ppl.plots`: Every figure of the package, one function each: `ax` in, `ax` out.
- `spike_ppl.predictive`: Would data simulated from the posterior look like the recording? And would data simulated from the prior?
- `spike_ppl.projection`: From waveforms to a few features per channel: an autoencoder, principal components, and what the noise has to do with it.
- `spike_ppl.quality`: Which clusters are one neuron: statistics and certainty of each unit, and the merges and splits to decide on, each with its probability.
- `spike_ppl.recording`: Open any extracellular recording, refuse a broken one in plain words, and bring its channels to one scale without moving a single spike.
- `spike_ppl.scale`: From seven channels to ten thousand: neighbourhoods of channels as independent jobs, run in process, on threads, on processes or on a Dask cluster, and joined by evidence.
- `spike_ppl.sort`: The main job: a recording goes in, units come out, each spike with the probability that it is of its unit.
- `spike_ppl.structure`: Whether a model is one that was met before, with other numbers in it: recognised by the graph of its random variables, and believed only after it was found right.
- `spike_ppl.templates`: A unit's mean waveform freed of noise, how far apart two of them are, and when two are one.
- `spike_ppl.units`: From clusters to neurons: sorted units, with all that is known of them, handed to SpikeInterface, Phy and NWB.
- `spike_ppl.variational`: Coordinate ascent on the model's own bound, over batches whose statistics are remembered, with moves that split, merge, empty and sort units.
- `spike_ppl.waveforms`: Find the spikes, cut them out aligned to a tenth of a sample, say which of them stand alone, and keep them on disk with their labels."""

__version__ = "0.1.0"
