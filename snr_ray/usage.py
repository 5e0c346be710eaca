"""What `snr STAGE --help` says of each stage beside its flags: what it is for, and examples."""

PURPOSE = {
    "demo": "simulate, train, denoise and evaluate on rendered letters; 10 minutes on 2 cores",
    "simulate": "make clean and noisy versions of images: a data folder of Parquet shards",
    "train": "train a model; the same command again continues a killed run",
    "sweep": "search the noise/content split and the loss weights with Optuna",
    "denoise": "remove (or inject) noise in any number of images",
    "evaluate": "score a model on test images beside baselines: tables and pictures",
    "reconstruct": "make images of a measured parallel-beam sinogram by filtered back projection",
    "bench": "measure the parts on this machine",
    "plan": "forecast hours, memory and bytes of a job of denoise or simulate",
}

EXAMPLES = {
    "demo": "snr demo --out demo",
    "simulate": """snr simulate --images glyphs --out data
  snr simulate --config cifar10 --images cifar10:cifar10/ --out data
  snr simulate --config places64 --images 's3://bucket/photos?region=eu-west-1' --out data""",
    "train": """snr train --images glyphs --out run
  snr train --config notmnist --images notmnist:notMNIST_small.tar.gz --out run
  snr train --config notmnist --config unet --data data --out unet
  snr train --config notmnist --images scans/ --out tuned --set train.start=notmnist
  snr train --config places64 --images photos/ --out run --batch-size 128 --set train.use_gpu=true
  snr train --config notmnist --config seed --data data --out run-seed --set train.num_workers=2
  MLFLOW_TRACKING_URI=sqlite:///mlflow.db snr train --images glyphs --out run""",
    "sweep": """snr sweep --images glyphs --out sweep --trials 20
  snr train --config sweep/best.yaml --images glyphs --out run
  snr sweep --images glyphs --out front --trials 40 --objective swap --objective inject
  snr sweep --images glyphs --out sweep --trials 20 --confirm 3
  snr sweep --images glyphs --out quick --trials 40 --at-most seconds=0.01
  snr sweep --images glyphs --out sweep-a --trials 90 --storage postgresql://user@host/optuna
  optuna-dashboard sweep/study.journal
  optuna-dashboard postgresql+psycopg://user@host/optuna""",
    "denoise": """snr denoise --images scans/ --out cleaned --views 60
  snr denoise --model ct --images series/ --out cleaned --views detect
  snr denoise --model places64 --images scans/ --out cleaned
  snr denoise --model run/model --images scans/ --out cleaned --views 30
  snr denoise --model run/model --images scans/ --out cleaned --views detect
  snr denoise --model run/model --images 'data/test#noisy_20' --out cleaned
  snr denoise --model run/model --images photos/ --out noisy --inject 20
  snr denoise --model run/model --images scans/ --out cleaned --donor random --samples 16""",
    "evaluate": """snr evaluate --model run/model --images glyphs --out report
  snr evaluate --model notmnist --images notmnist:notMNIST.tar.gz --out report --limit 200
  snr evaluate --model run/model --beside unet/model --images glyphs --out report
  snr evaluate --model places64 --images slices/ --out report --size 128 --views 80,40,20 \\
      --split all --baselines tvrec --set images.window=[-1000,1000]""",
    "reconstruct": """snr reconstruct --sinogram scan.h5 --center 295.5 --out slices
  snr reconstruct --sinogram scan.h5 --center 295.5 --every 4 --bin 4 --out slices45
  snr reconstruct --sinogram sinogram.npy --flats flats.npy --darks darks.npy --out slices
  snr denoise --images slices45/ --out cleaned --views 45 --set images.white=0.04""",
    "bench": """snr bench radon
  snr bench train --out train.json
  snr bench simulate --set images.size=32 --set images.limit=1000000 --out simulate.json""",
    "plan": """snr plan --images 1e6 --size 128 --views 30 --model places64
  snr plan --images 1e8 --size 512 --views 90 --nodes 20 --cores 32 --price 1.1
  snr plan --images 1e6 --size 512 --views 160 --model ct --like 'slices/a*.dcm'
  snr plan --images 1e8 --size 128 --views 30 --rates there.json --gpus 8 --nodes 4""",
}

USES = {
    "simulate": ("images", "noise"),
    "denoise": ("seed", "images.white", "images.window"),
    "evaluate": tuple(
        f"images.{key}" for key in ("fit", "white", "window", "limit", "channels", "group")
    ),
    "reconstruct": (),
}
"""Sections and keys of the configuration that a stage reads; those that are not here read all."""

SRC_HELP = """SRC is one of
  glyphs              letters A to J in matplotlib's fonts, made here
  photos              crops of scikit-image's photographs
  notmnist[:PATH]     notMNIST_small: the tar.gz, its folder, or downloaded
  cifar10[:PATH]      CIFAR-10: Parquet files, a folder, or downloaded
  places365[:PATH]    Places365: a folder, or downloaded
  PATH, glob or URI   a folder of images (png jpg tif bmp webp npy dcm nii zarr)
                      or of Parquet files; s3://, gs:// and file:// work; #COLUMN picks
                      a Parquet column"""
