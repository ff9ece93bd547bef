"""What each structure captures of a model's weights at equal parameters, beside what it captures of random ones."""

from kronpress.spectrum.measure import Spectrum, SpectrumCurve, SpectrumRow, spectrum, spectrum_of_weights
from kronpress.spectrum.show import check_plot_path, plot_spectrum, spectrum_tables

__all__ = [
    "Spectrum",
    "SpectrumCurve",
    "SpectrumRow",
    "check_plot_path",
    "plot_spectrum",
    "spectrum",
    "spectrum_of_weights",
    "spectrum_tables",
]
