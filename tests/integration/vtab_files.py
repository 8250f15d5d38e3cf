"""Small files in the formats of VTAB's publishers, with images whose colour or shape says their class."""

import csv
import gzip
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from scipy.io import savemat


def picture(label, number=0, size=(24, 20), kind="PNG"):
    """Encoded image, size as (height, width), nearly of one colour, by class."""
    rng = np.random.default_rng((label, number))
    colour = np.array([(37 * label) % 256, (91 * label + 60) % 256, (151 * label + 120) % 256])
    pixels = np.clip(colour + rng.integers(-9, 10, (*size, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files, mode="w:gz"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tree(folder, files):
    for name, data in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def caltech(data, per_class=33):
    """102 class folders in a tar.gz, one class with more images, beside a file of another kind."""
    folder = data / "caltech101"
    folder.mkdir()
    names = ["BACKGROUND_Google", *(f"thing_{i:03d}" for i in range(101))]
    files = {
        f"101_ObjectCategories/{name}/image_{n + 1:04d}.jpg": picture(label, n, (9, 12), "JPEG")
        for label, name in enumerate(names)
        for n in range(per_class + (4 if label == 7 else 0))
    }
    files["101_ObjectCategories/BACKGROUND_Google/tmp"] = b"not an image"
    write_tar(folder / "101_ObjectCategories.tar.gz", files)


def cifar100(data, num_train=40, num_test=20):
    """The binary version: a byte for the coarse class, one for the fine, then planes of red, green and blue."""
    folder = data / "cifar100"
    folder.mkdir()
    files = {"cifar-100-binary/fine_label_names.txt": "".join(f"thing{i}\n" for i in range(100)).encode()}
    for part, count in (("train", num_train), ("test", num_test)):
        rows = [
            bytes([i % 20, i % 100]) + b"".join(bytes([c * i % 256]) * 1024 for c in (1, 2, 3)) for i in range(count)
        ]
        files[f"cifar-100-binary/{part}.bin"] = b"".join(rows)
    write_tar(folder / "cifar-100-binary.tar.gz", files)


def flowers(data, counts=(6, 6, 10), size=(30, 40)):
    folder = data / "oxford_flowers102"
    folder.mkdir()
    total = sum(counts)
    order = np.random.default_rng(0).permutation(total) + 1
    ends = np.cumsum(counts)
    write_tar(
        folder / "102flowers.tgz",
        {f"jpg/image_{n:05d}.jpg": picture(n, 0, size, "JPEG") for n in range(1, total + 1)},
    )
    savemat(folder / "imagelabels.mat", {"labels": np.arange(total)[None] % 102 + 1})
    sets = dict(zip(("trnid", "valid", "tstid"), np.split(order, ends[:2]), strict=True))
    savemat(folder / "setid.mat", {name: numbers[None] for name, numbers in sets.items()})
    return sets


def pets(data, num_train=40, num_test=37):
    folder = data / "oxford_iiit_pet"
    folder.mkdir()
    lists = {}
    images = {}
    for name, count in (("trainval", num_train), ("test", num_test)):
        lines = []
        for n in range(count):
            image = f"Breed_{chr(65 + n % 37 // 10)}{n % 10}_{name}{n}"
            lines.append(f"{image} {n % 37 + 1} 1 1")
            images[f"images/{image}.jpg"] = picture(n % 37, n, (30, 40), "JPEG")
        lists[f"annotations/{name}.txt"] = ("\n".join(lines) + "\n").encode()
    write_tar(folder / "images.tar.gz", images)
    write_tar(folder / "annotations.tar.gz", lists)


def dtd(data, per_split=2):
    folder = data / "dtd"
    folder.mkdir()
    files, lists = {}, {split: [] for split in ("train", "val", "test")}
    for label in range(47):
        for number in range(3 * per_split):
            name = f"texture{label:02d}/texture{label:02d}_{number:04d}.jpg"
            files[f"dtd/images/{name}"] = picture(label, number, kind="JPEG")
            lists[("train", "val", "test")[number // per_split]].append(name)
    for split, names in lists.items():
        for fold in (1, 2):  # the second fold is another split
            text = "\n".join(names if fold == 1 else names[::-1][:5]) + "\n"
            files[f"dtd/labels/{split}{fold}.txt"] = text.encode()
    write_tar(folder / "dtd-r1.0.1.tar.gz", files)
    return lists


def sun(data, per_split=1):
    folder = data / "sun397"
    classes = ["/a/abbey", "/c/car_interior/backseat", *(f"/x/scene{i:03d}" for i in range(395))]
    lists = {split: [] for split in ("tr", "va", "te")}
    files = {}
    for label, name in enumerate(classes):
        for number, split in enumerate(lists):
            for n in range(per_split):
                file = f"{name}/sun_{label:03d}{number}{n}.jpg"
                lists[split].append(file)
                files[f"SUN397{file}"] = picture(label, number, (8, 8), "JPEG")
    files["SUN397/c/church/outdoor/sun_bhenjvsvrtumjuri.jpg"] = b"no image, and in no list"
    write_tree(folder, files)
    for split, names in lists.items():
        (folder / f"sun397_tfds_{split}.txt").write_text("\n".join(names) + "\n")


def svhn(data, num_train=30, num_test=20):
    folder = data / "svhn"
    folder.mkdir()
    for part, count in (("train", num_train), ("test", num_test)):
        rng = np.random.default_rng(count)
        digits = np.arange(count) % 10
        shade = (digits[:, None, None, None] * 25).astype(np.int64)
        pixels = np.clip(shade + rng.integers(0, 20, (count, 32, 32, 3)), 0, 255).astype(np.uint8)
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        savemat(folder / f"{part}_32x32.mat", {"X": pixels.transpose(1, 2, 3, 0), "y": labels}, do_compression=True)


def camelyon(data, counts=(12, 6, 8)):
    folder = data / "patch_camelyon"
    folder.mkdir()
    for split, count in zip(("train", "valid", "test"), counts, strict=True):
        labels = np.arange(count, dtype=np.uint8) % 2
        pixels = np.random.default_rng(count).integers(0, 60, (count, 96, 96, 3)) + 150 * labels[:, None, None, None]
        for name, key, value in (("x", "x", pixels.astype(np.uint8)), ("y", "y", labels.reshape(-1, 1, 1, 1))):
            with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{name}.h5", "w") as file:
                file.create_dataset(key, data=value, compression="gzip")


def eurosat(data, per_class=10):
    folder = data / "eurosat"
    folder.mkdir()
    files = {
        f"2750/Land{label}/Land{label}_{n + 1}.jpg": picture(label, n, (64, 64), "JPEG")
        for label in range(10)
        for n in range(per_class)
    }
    write_zip(folder / "EuroSAT.zip", files | {"__MACOSX/2750/._x.jpg": b"junk"})


def resisc(data, per_class=5):
    files = {
        f"NWPU-RESISC45/scene{label:02d}/scene{label:02d}_{n + 1:03d}.jpg": picture(label, n, (16, 16), "JPEG")
        for label in range(45)
        for n in range(per_class)
    }
    write_tree(data / "resisc45", files)


def eye(level, radius=60):
    """A disc on black, its colour by level."""
    rows, columns = np.mgrid[: 2 * radius + 20, : 3 * radius]
    inside = (rows - radius - 10) ** 2 + (columns - 1.5 * radius) ** 2 <= radius**2
    pixels = np.zeros((*inside.shape, 3), np.uint8)
    pixels[inside] = (200, 60 + 30 * level, 40)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def retinopathy(data, counts=(10, 5, 5)):
    folder = data / "diabetic_retinopathy"
    files = {f"train/{i}_left.jpeg": eye(i % 5) for i in range(counts[0])}
    files |= {f"test/{i}_right.jpeg": eye(i % 5) for i in range(sum(counts[1:]))}
    write_tree(folder, files)
    with (folder / "trainLabels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "level"), *((f"{i}_left", i % 5) for i in range(counts[0]))])
    with (folder / "retinopathy_solution.csv").open("w", newline="") as file:
        rows = [(f"{i}_right", i % 5, "Public" if i < counts[1] else "Private") for i in range(sum(counts[1:]))]
        csv.writer(file).writerows([("image", "level", "Usage"), *rows])


def clevr(data, num_train=20, num_val=8):
    """Scenes of 3 to 10 objects, as RGBA pictures in a zip; returns the depths by file."""
    folder = data / "clevr"
    folder.mkdir()
    files, depths = {}, {}
    for part, count in (("train", num_train), ("val", num_val)):
        scenes = []
        for number in range(count):
            name = f"CLEVR_{part}_{number:06d}.png"
            nearest = (7.5, 8.25, 8.75, 9.25, 9.75, 11.0)[number % 6]
            depths[name] = [nearest + i / 10 for i in range(3 + number % 8)][::-1]
            objects = [{"pixel_coords": [10, 20, depth], "shape": "cube"} for depth in depths[name]]
            scenes.append({"image_filename": name, "split": part, "objects": objects})
            buffer = io.BytesIO()
            Image.open(io.BytesIO(picture(number % 8, number, (32, 48)))).convert("RGBA").save(buffer, "PNG")
            files[f"CLEVR_v1.0/images/{part}/{name}"] = buffer.getvalue()
        files[f"CLEVR_v1.0/scenes/CLEVR_{part}_scenes.json"] = json.dumps({"info": {}, "scenes": scenes}).encode()
    write_zip(folder / "CLEVR_v1.0.zip", files)
    return depths


def example_class():
    """The message tf.train.Example, made by the protobuf library from its published definition."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    repeated, optional = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED, 1
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}  # TYPE_BYTES, TYPE_FLOAT, TYPE_INT64
    for name, kind in kinds.items():
        file.message_type.add(name=name).field.add(name="value", number=1, label=repeated, type=kind)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (field, name) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), 1
    ):
        feature.field.add(name=field, number=number, label=optional, type=11, type_name=f".t.{name}", oneof_index=0)
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=optional, type=9)
    entry.field.add(name="value", number=2, label=optional, type=11, type_name=".t.Feature")
    features.field.add(name="feature", number=1, label=repeated, type=11, type_name=".t.Features.FeatureEntry")
    file.message_type.add(name="Example").field.add(
        name="features", number=1, label=optional, type=11, type_name=".t.Features"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def write_records(path, examples):
    """A TFRecord file of dicts of features; checksums are left at zero."""
    make = example_class()
    with open(path, "wb") as file:
        for features in examples:
            message = make()
            for name, value in features.items():
                target = message.features.feature[name]
                if isinstance(value, bytes):
                    target.bytes_list.value.append(value)
                elif isinstance(value, int):
                    target.int64_list.value.append(value)
                else:
                    target.float_list.value.extend(value)
            data = message.SerializeToString()
            file.write(struct.pack("<QI", len(data), 0) + data + bytes(4))


def dmlab(data, counts=(14, 7, 9)):
    folder = data / "dmlab"
    folder.mkdir()
    for part, count in zip(("train", "validation", "test"), counts, strict=True):
        examples = [
            {
                "image": picture(i % 6, i, (36, 48), "JPEG"),
                "filename": f"frame{i:03d}.png".encode(),
                "label": i % 6,
            }
            for i in range(count)
        ]
        half = count // 2
        write_records(folder / f"dmlab-{part}.tfrecord-00000-of-00002", examples[:half])
        write_records(folder / f"dmlab-{part}.tfrecord-00001-of-00002", examples[half:])


def prepared(data, folder, splits):
    """A version folder of TensorFlow Datasets in two shards a split: features of each example by split."""
    place = data / folder / "tfds"
    place.mkdir(parents=True)
    (place / "dataset_info.json").write_text(json.dumps({"name": folder}))
    for split, examples in splits.items():
        half = (len(examples) + 1) // 2
        for shard, some in enumerate((examples[:half], examples[half:])):
            write_records(place / f"{folder}-{split}.tfrecord-{shard:05d}-of-00002", some)
    return place


def kitti(data, num_images=60, num_videos=20):
    """Images of several videos; the nearest vehicle by number: at 5 m, 15 m, 40 m, none."""
    folder = data / "kitti"
    folder.mkdir()
    rows = "{} 0.00 0 -1.57 100.0 100.0 200.0 200.0 1.5 1.6 3.9 1.0 1.7 {} -1.5"
    images, labels = {}, {"training/label_2/": b""}
    for number in range(num_images):
        kind = number % 4
        lines = [rows.format("Pedestrian", 2.0), rows.format("DontCare", -1000)]
        if kind < 3:
            lines += [rows.format("Truck", 60.5), rows.format(("Car", "Van", "Truck")[kind], (5.0, 15.0, 40.0)[kind])]
        images[f"training/image_2/{number:06d}.png"] = picture(kind, number, (12, 40))
        images[f"testing/image_2/{number:06d}.png"] = picture(9, number, (12, 40))
        labels[f"training/label_2/{number:06d}.txt"] = ("\n".join(lines) + "\n").encode()
    labels.pop("training/label_2/")
    order = np.random.default_rng(0).permutation(num_images)
    mapping = [""] * num_images
    for number, line in enumerate(order):
        mapping[line] = f"2011_09_26 2011_09_26_drive_{number % num_videos:04d}_sync {number:010d}"
    devkit = {
        "mapping/train_rand.txt": ",".join(str(line + 1) for line in order).encode(),
        "mapping/train_mapping.txt": ("\n".join(mapping) + "\n").encode(),
    }
    write_zip(folder / "data_object_image_2.zip", images)
    write_zip(folder / "data_object_label_2.zip", labels)
    write_zip(folder / "devkit_object.zip", devkit)


def dsprites(data, count=400):
    """Squares at 32 places and 40 orientations; returns the factors."""
    folder = data / "dsprites"
    folder.mkdir()
    rng = np.random.default_rng(0)
    sizes = np.array([1, 3, 6, 40, 32, 32])
    factors = (rng.random((count, 6)) * sizes).astype(np.int64)
    images = np.zeros((count, 64, 64), np.uint8)
    for i, row in enumerate(factors):
        images[i, row[5] : row[5] + 8 + row[3] % 8, row[4] : row[4] + 8] = 1
    np.savez_compressed(
        folder / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz",
        imgs=images,
        latents_classes=factors,
        latents_values=factors.astype(np.float64),
        metadata=np.array({"title": "pickled, as theirs is"}, dtype=object),
    )
    return factors


def norb_matrix(array):
    kind = {"uint8": 0x1E3D4C55, "int32": 0x1E3D4C54}[array.dtype.name]
    sizes = [*array.shape, *[1] * (3 - array.ndim)]
    return struct.pack(f"<{2 + len(sizes)}i", kind, array.ndim, *sizes) + array.tobytes()


def smallnorb(data, num_train=40, num_test=30, compressed=True):
    """Grey images, the second camera's all white; returns the info of both parts."""
    folder = data / "smallnorb"
    folder.mkdir()
    infos = {}
    for part, count in (("5x46789x9x18x6x2x96x96-training", num_train), ("5x01235x9x18x6x2x96x96-testing", num_test)):
        i = np.arange(count)
        info = np.stack([i % 5, i % 9, 2 * (i % 18), i % 6], axis=1).astype(np.int32)
        pixels = np.full((count, 2, 96, 96), 255, np.uint8)
        pixels[:, 0] = (10 * info[:, 1] + 3 * info[:, 2] // 2)[:, None, None]
        infos[part.rpartition("-")[2]] = info
        for kind, array in (("dat", pixels), ("cat", (i % 5).astype(np.int32)), ("info", info)):
            path = folder / f"smallnorb-{part}-{kind}.mat"
            matrix = norb_matrix(array)
            if compressed:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(matrix, 1))
            else:
                path.write_bytes(matrix)
    return infos
