"""scikit-learn's handwritten digits as a data set of TFDS."""

from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow_datasets as tfds


class Digits(tfds.core.GeneratorBasedBuilder):
    """scikit-learn's 1,797 handwritten digits, 8x8 pixels each, as a TFDS data set: no download.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI (1998). A
    fixed permutation puts 360 examples into `test` and 1,437 into `train`.
    """

    VERSION = tfds.core.Version('1.0.0')
    NUM_EXAMPLES, NUM_TEST = 1797, 360

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(8, 8, 1)),
                    'label': tfds.features.ClassLabel(num_classes=10),
                    'id': np.int64,  # row in scikit-learn's array
                }
            ),
            supervised_keys=('image', 'label'),
            description=self.__doc__,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        # RandomState's stream is frozen, default_rng's is not.
        order = np.random.RandomState(0).permutation(self.NUM_EXAMPLES)
        return {
            'train': self._generate_examples(order[self.NUM_TEST :]),
            'test': self._generate_examples(order[: self.NUM_TEST]),
        }

    def _generate_examples(self, rows: Iterable[int]) -> Iterator[tuple[int, dict]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for row in rows:
            # Scikit-learn's values are 0 to 16.
            pixels = np.rint(digits.images[row] * (255 / 16)).astype(np.uint8)
            yield (
                int(row),
                {'image': pixels[..., None], 'label': int(digits.target[row]), 'id': int(row)},
            )
