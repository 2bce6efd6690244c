"""The four ideas as pure functions of tensors, and the legend of every letter.

| letter | axis                          | letter | axis                       |
|--------|-------------------------------|--------|----------------------------|
| b      | batch                         | e      | inner (expanded) width     |
| t      | position in the text          | n      | SSM state                  |
| s      | position attended to          | r      | thinking round             |
| d      | model width                   | v      | vocabulary                 |
| h      | attention head                | tau    | diffusion time, 1 .. T     |
| c      | channel of a head or an embedding                                    |||

Time in diffusion is `tau`, never `t`. An axis that one function alone has is named by a word,
`window+1`, or said beside its shape; Muon's `(k m n)` are k matrices of m rows and n columns.
Symbols, as values and not as axes:

- attention: `q, k, v` are queries, keys and values.
- halting: `p` is a distribution over rounds, `g` that of the prior, `R` the number of rounds.
- noise: `alpha_bar` is the fraction of the variance at a noise level that is signal, `snr` the
  signal-to-noise ratio, `T` the number of levels, `x0` clean data, `x_tau` the same at level tau,
  `eps` standard normal noise, `eta` the fraction of fresh noise in a step.
- scan: `u` is the input, `y` the output, `delta` the step size, `A, B, C, D` the matrices, `h` the
  hidden state; there `g` is the gradient of `h`.
- elsewhere `u` is uniform in 0..1, as a number drawn or as time in a schedule.

Likelihoods are in nats per character.

Everything here takes tensors and returns tensors: no modules, no files, nothing but torch and
einops (the scan apart, which asks `kernels` for the fastest way), and float64 in gives float64 out.
Shapes stand at the arguments as types; the tests hold every call to them.
"""
