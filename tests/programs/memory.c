// The engine of the live pages under an address sanitizer: each file of weights is opened, and asked for all that a
// page may ask for, in the largest sizes.
#include <stdio.h>

#include "engine.c"

int main(int count_of_words, char **words) {
  for (int i = 1; i < count_of_words; i++) {
    FILE *from = fopen(words[i], "rb");
    fseek(from, 0, SEEK_END);
    int bytes = ftell(from), full;
    rewind(from);
    if (fread(room(bytes), 1, bytes, from) != (size_t)bytes || open_model(bytes)) return 1;
    fclose(from);
    full = m.window + 1;
    for (int k = 0; k < full * m.vocabulary; k++) get_noise()[k] = 1;
    for (int k = 0; k < full; k++) get_ids()[k] = k % m.vocabulary, get_mask()[k] = k > 0;
    if (page_model()) {
      page(full);
      set_rule(1, 0);
      for (int left = 3; left && m.kind == PAGE_THINKER; left--) refine(left, .8f);
      if (m.kind == DIFFUSION) denoise(.2, .6, 1, .8f), denoise(.6, 1, 1, 0);
    } else {
      restart(3);
      set_rule(1, 99);  // no more than the model has
      for (int more = 0; more < 2 * full; more++) push(more % m.vocabulary);
      restart(full);
      for (int more = 0; more < full; more++) choose(.8f);
      if (m.kind == MAMBA) remembered(full), step_size(m.window);
    }
  }
  return 0;
}
