/* Classifies a picture of one colour: fills the input, runs the network, reads the output. */
#include <stdio.h>
#include <string.h>

#include "resnet8/model.h"

int main(void)
{
    static int8_t picture[RESNET8_INPUT_BYTES];
    int8_t probabilities[RESNET8_OUTPUT_BYTES];
    int best = 0;

    memset(picture, RESNET8_INPUT_ZERO_POINT, sizeof picture); /* the value 0, whatever code that has */
    if (resnet8_run(picture, probabilities) != 0) {
        return 1;
    }
    for (int i = 1; i < RESNET8_OUTPUT_BYTES; ++i) {
        best = (probabilities[i] > probabilities[best]) ? i : best;
    }
    const double probability = (probabilities[best] - RESNET8_OUTPUT_ZERO_POINT) * (double)RESNET8_OUTPUT_SCALE;
    printf("class %d with probability %.2f\n", best, probability);
    return 0;
}
