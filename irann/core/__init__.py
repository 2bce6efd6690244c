"""The four ideas as pure functions of tensors, and the legend of every letter.

| letter | axis                          | letter | axis                       |
|--------|-------------------------------|--------|----------------------------|
| b      | batch                         | e      | inner (expanded) width     |
| t      | place in the text             | n      | state of the state space   |
| s      | place attended to             | r      | thinking round             |
| d      | model width                   | v      | vocabulary                 |
| h      | attention head                | tau    | diffusion time             |
| c      | channel of a head or a point  |        |                            |

Time in diffusion is `tau`, never `t`. An axis that one function alone has is named by a word, `(b window+1)`, or said beside its
shape; Muon's `(k m n)` are k matrices of m rows and n columns. Symbols, as values and not as axes:

- attention: `q, k, v` are queries, keys and values.
- halting: `p` is a distribution over rounds, `g` that of the prior, `R` how many rounds there are.
- noise: `alpha_bar` is the share of signal variance left at a noise level, `snr` signal over noise, `T` how many levels there
  are, `x0` what is clean, `x_tau` the same at level tau, `eps` standard normal noise, `eta` how much of a step's fresh noise is used.
- scan: `u` is what comes in, `y` what goes out, `delta` the step size, `A, B, C, D` the matrices, `h` the hidden state; there `g` is the
  gradient of `h`.
- elsewhere `u` is uniform in 0..1, as a number drawn or as time in a schedule.

Likelihoods are in nats per character.

Everything here takes tensors and returns tensors: no modules, and float64 in gives float64 out. No files either, but for the scan's
C kernel, which is compiled once and kept in the cache.
"""
