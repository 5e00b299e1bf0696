//! What the ranks of tests/tests/nccl.rs do and say, in threads of one process as in processes of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use models::Request;
use models::stage::{Inputs, Stage, StageEvent};
use parallel::mesh::Mesh;
use parallel::{Collective, DType, Device, Error, Tensor};

/// Longest wait for what a healthy group does in milliseconds; the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// The component of the bundled model that is run.
pub const ENCODER: &str = "text_encoder_2";

/// The bundled model.
pub fn bundled() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../bundled/emoji")
}

/// Every collective of the contract, on this rank; in words that tell every bit.
///
/// # Errors
/// What a collective says.
pub fn collectives(mesh: &Mesh) -> Result<Vec<(String, String)>, Error> {
    let (rank, size) = (mesh.rank(), mesh.size());
    let mut said = Vec::new();
    let mut say = |name: &str, value: &Tensor| -> Result<(), Error> {
        said.push((name.to_owned(), show(value)?));
        Ok(())
    };
    // Their sum depends on the order of additions.
    let values: Vec<f32> =
        (0..300).map(|i| 1.0 / (rank as f32 + 3.0 + i as f32) + if rank % 2 == 0 { 1e7 } else { -1e7 }).collect();
    let x = Tensor::from_vec(values, (3, 100), &Device::Cpu)?;
    say("all_reduce f32", &mesh.all_reduce(&x)?)?;
    for dtype in [DType::BF16, DType::F16, DType::F64, DType::U32, DType::I64] {
        let x = Tensor::full(rank as f32 + 0.375, (2, 3), &Device::Cpu)?.to_dtype(dtype)?;
        say(&format!("all_reduce {}", dtype.as_str()), &mesh.all_reduce(&x)?)?;
    }
    say("all_reduce of a part of a tensor", &mesh.all_reduce(&x.narrow(1, 10, 20)?)?)?;
    say("all_gather 0", &mesh.all_gather(&x, 0)?)?;
    say("all_gather 1", &mesh.all_gather(&x, 1)?)?;
    say("all_gather of nothing", &mesh.all_gather(&Tensor::zeros((0, 4), DType::F32, &Device::Cpu)?, 0)?)?;
    for root in 0..size {
        let mine = (root == rank).then_some(&x);
        say(&format!("broadcast {root}"), &mesh.broadcast(mine, root)?)?;
    }
    // All send before any receives: a send waits for nobody.
    mesh.send(&x, (rank + 1) % size)?;
    mesh.send(&(&x * 2.0)?, (rank + 1) % size)?;
    say("recv", &mesh.recv((rank + size - 1) % size)?)?;
    say("recv again", &mesh.recv((rank + size - 1) % size)?)?;
    let any = [mesh.any(rank + 1 == size)?, mesh.any(false)?].map(u8::from);
    say("any", &Tensor::new(&any, &Device::Cpu)?)?;
    if size == 4 {
        let pair = mesh.subgroup(if rank < 2 { &[0, 1] } else { &[2, 3] })?;
        say("all_reduce of a pair", &pair.all_reduce(&x)?)?;
    }
    Ok(said)
}

/// Shape, type and every bit.
///
/// # Errors
/// When the tensor cannot be read.
pub fn show(x: &Tensor) -> Result<String, Error> {
    let mut bytes = Vec::new();
    parallel::bytes::append(x, &mut bytes)?;
    let bits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{:?} {} {bits}", x.dims(), x.dtype().as_str()))
}

/// An error by its kind and its words, in one line.
pub fn line_of(error: &Error) -> String {
    let debug = format!("{error:?}");
    let kind: String = debug.chars().take_while(|c| c.is_alphanumeric()).collect();
    format!("error {kind}: {error}")
}

/// Runs one prompt through a text encoder.
///
/// # Errors
/// What the encoder says.
pub fn encode(stage: &mut dyn Stage) -> Result<String, Error> {
    stage.start(0, Request { prompt: "red heart".into(), max_sequence_length: 32, ..Request::default() }, Inputs::default());
    let mut outcome = Err(Error::Frame("the encoder gave nothing".into()));
    let mut more = true;
    while more {
        let turn = stage.turn(&mut |event| match event {
            StageEvent::Done { payload, .. } => {
                let mut inputs = Inputs::default();
                let added = inputs.add(payload).map_err(|error| Error::Frame(error.to_string()));
                outcome = added.and_then(|()| show(inputs.conditioning.get("prompt_embeds")?));
            }
            StageEvent::Failed { error, .. } => outcome = Err(Error::Frame(error.to_string())),
            _ => {}
        });
        more = turn.map_err(|error| Error::Frame(error.to_string()))?;
    }
    outcome
}
